"""What ``--help`` and ``--version`` print."""

from __future__ import annotations

import qsd

INTERFACE = "11.1"

_HELP = """\
Usage: {prog} [option]...

A storage daemon: opens disk images as block nodes, exports them, and is controlled over QMP.
Options other than --help, --version, --daemonize and --pidfile take effect in the order they are given,
so define a thing before you use it. Those that take key=value lists also take a JSON object; write a
comma in a value twice.

General
  -h, --help                 show this text
  -V, --version              show the version
  --daemonize                go into the background; the caller gets exit code 0 once everything is up
  --pidfile PATH             write the process id to PATH (locked, removed at exit) once everything is up
  -T, --trace [enable=]PATTERN[,events=FILE][,file=FILE]
                             print events whose names match PATTERN ('*' matches anything, a leading '-'
                             switches off) or a line of FILE; to stderr or the second FILE
  -T help                    list the events

Block nodes
  --blockdev [driver=]DRIVER,node-name=NAME[,read-only=on|off][,auto-read-only=on|off]
             [,cache.direct=on|off][,cache.no-flush=on|off][,discard=ignore|unmap]
             [,detect-zeroes=off|on|unmap][,force-share=on|off][,OPTION=VALUE]...
                             open a node, as the QMP command blockdev-add does

Exports
  --nbd-server addr.type=unix,addr.path=PATH[,max-connections=N][,handshake-max-seconds=N]
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,...]
  --nbd-server addr.type=fd,addr.str=FD[,...]
                             listen for NBD clients
  --export [type=]nbd,id=ID,node-name=NAME[,name=EXPORT][,description=TEXT][,writable=on|off]
           [,writethrough=on|off][,bitmap=BITMAP][,allocation-depth=on|off][,iothread=ID]
  --export [type=]fuse,id=ID,node-name=NAME,mountpoint=FILE[,writable=on|off][,growable=on|off]
           [,allow-other=on|off|auto][,writethrough=on|off][,iothread=ID]
                             export a node, as the QMP command block-export-add does

Control
  --chardev BACKEND,id=ID[,OPTION=VALUE]...
                             make a character device; '--chardev help' lists the backends
  --monitor [chardev=]ID[,mode=control][,pretty=on|off][,id=NAME]
                             serve QMP on a character device
  --object TYPE,id=ID[,PROPERTY=VALUE]...
                             make an object; '--object help' lists the types, '--object TYPE,help' properties

Signals: SIGTERM, SIGINT and SIGHUP shut down cleanly; SIGUSR1 prints what runs inside to stderr.
"""


def help_text(prog: str) -> str:
    """The text of ``--help``."""
    return _HELP.format(prog=prog)


def version_text(prog: str) -> str:
    """The text of ``--version``: the first line is ours, the second names the interface that is served."""
    return f"{prog} version {qsd.__version__}\nServes the interface of qemu-storage-daemon {INTERFACE}\n"
