"""What the kernel asks of the view, answered through pyfuse3. Everything is read-only.

An inode number stands for a path. A file's bytes are made when it is opened, so that a reader sees one moment; node
data is read as the node is now, through an edge of the graph that lives as long as the file is open.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import wraps
from itertools import count
from typing import Any, ParamSpec, TypeVar

import pyfuse3

from qsd.actors.edges import RootEdge, RootOptions
from qsd.block.permissions import Perm
from qsd.errors import QmpError
from qsd.servers.view.contents import Sources, make_tree
from qsd.servers.view.tree import Data, Directory, Entry, Path, Text, find

P = ParamSpec("P")
T = TypeVar("T")

# Node data is nobody's business but the daemon's owner's, also where others may enter (allow-other).
_DATA_MODE = stat.S_IFREG | 0o400
_TEXT_MODE = stat.S_IFREG | 0o444
_DIRECTORY_MODE = stat.S_IFDIR | 0o555


def _answering(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Turn the daemon's errors into errno values: a request that fails is not a crash."""

    @wraps(function)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await function(*args, **kwargs)
        except QmpError:
            raise pyfuse3.FUSEError(errno.EBUSY) from None
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    return answer


class Operations(pyfuse3.Operations):
    """See the module."""

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self._graph = sources.graph
        self._tree = make_tree(sources)
        self._paths: dict[int, Path] = {pyfuse3.ROOT_INODE: ()}
        self._inodes: dict[Path, int] = {(): pyfuse3.ROOT_INODE}
        self._lookups: dict[int, int] = {}
        self._next_inode = count(pyfuse3.ROOT_INODE + 1)
        self._next_handle = count(1)
        self._texts: dict[int, bytes] = {}
        self._edges: dict[int, RootEdge] = {}
        self._listings: dict[int, list[tuple[str, Path, Entry]]] = {}
        self._born = time.time_ns()

    # -- inodes -----------------------------------------------------------------------------------------------

    async def _find(self, inode: int) -> Entry:
        path = self._paths.get(inode)
        entry = await find(self._tree, path) if path is not None else None
        if entry is None:
            raise OSError(errno.ENOENT, "no such entry")
        return entry

    def _inode(self, path: Path) -> int:
        inode = self._inodes.get(path)
        if inode is None:
            inode = self._inodes[path] = next(self._next_inode)
            self._paths[inode] = path
        return inode

    async def _attributes(self, inode: int, entry: Entry) -> Any:
        found = pyfuse3.EntryAttributes()
        found.st_ino = inode
        # Ask again at every look: what is shown changes by itself.
        found.attr_timeout = found.entry_timeout = 0
        found.st_uid, found.st_gid = os.getuid(), os.getgid()
        found.st_nlink = 1
        found.st_atime_ns = found.st_mtime_ns = found.st_ctime_ns = self._born
        if isinstance(entry, Directory):
            found.st_mode = _DIRECTORY_MODE
        elif isinstance(entry, Data):
            found.st_mode, found.st_size = _DATA_MODE, entry.length
            found.st_blksize = 1 << 16
        else:
            found.st_mode, found.st_size = _TEXT_MODE, len(await entry.render())
        found.st_blocks = -(-found.st_size // 512)
        return found

    @_answering
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        """The attributes of a name in a directory."""
        path = (*self._paths[parent_inode], os.fsdecode(name))
        entry = await find(self._tree, path)
        if entry is None:
            raise OSError(errno.ENOENT, "no such entry")
        inode = self._inode(path)
        attributes = await self._attributes(inode, entry)
        self._lookups[inode] = self._lookups.get(inode, 0) + 1
        return attributes

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel knows these no more."""
        for inode, times in inode_list:
            left = self._lookups.get(inode, 0) - times
            if left > 0:
                self._lookups[inode] = left
                continue
            self._lookups.pop(inode, None)
            if inode != pyfuse3.ROOT_INODE and inode in self._paths:
                del self._inodes[self._paths.pop(inode)]

    @_answering
    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        """The attributes of an inode."""
        return await self._attributes(inode, await self._find(inode))

    # -- directories ------------------------------------------------------------------------------------------

    @_answering
    async def opendir(self, inode: int, ctx: Any) -> int:
        """Take down what the directory holds now."""
        directory = await self._find(inode)
        if not isinstance(directory, Directory):
            raise OSError(errno.ENOTDIR, "not a directory")
        base = self._paths[inode]
        entries = await directory.entries()
        handle = next(self._next_handle)
        self._listings[handle] = [(name, (*base, name), entries[name]) for name in sorted(entries)]
        return handle

    @_answering
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """Go on with the listing."""
        for number, (name, path, entry) in enumerate(self._listings[fh][start_id:], start_id + 1):
            inode = self._inode(path)
            attributes = await self._attributes(inode, entry)
            if not pyfuse3.readdir_reply(token, os.fsencode(name), attributes, number):
                if inode not in self._lookups:
                    del self._inodes[self._paths.pop(inode)]
                break
            self._lookups[inode] = self._lookups.get(inode, 0) + 1

    async def releasedir(self, fh: int) -> None:
        """Forget the listing."""
        self._listings.pop(fh, None)

    # -- files ------------------------------------------------------------------------------------------------

    @_answering
    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        """Make a file's bytes, or use the node."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "read-only")
        entry = await self._find(inode)
        handle = next(self._next_handle)
        if isinstance(entry, Text):
            self._texts[handle] = await entry.render()
        elif isinstance(entry, Data):
            options = RootOptions(Perm.CONSISTENT_READ, allow_inactive=True, text="view")
            self._edges[handle] = await self._graph.attach(entry.node_name, options)
        else:
            raise OSError(errno.EISDIR, "a directory")
        # Nothing is kept in the page cache: the next reader sees the next moment.
        return pyfuse3.FileInfo(fh=handle, direct_io=True, keep_cache=False)

    @_answering
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Bytes of an open file; fewer at its end."""
        text = self._texts.get(fh)
        if text is not None:
            return text[off : off + size]
        edge = self._edges[fh]
        length = max(0, min(size, edge.length - off))
        return await edge.read(off, length) if length else b""

    @_answering
    async def release(self, fh: int) -> None:
        """The file is closed."""
        self._texts.pop(fh, None)
        edge = self._edges.pop(fh, None)
        if edge is not None:
            await edge.detach()

    @_answering
    async def statfs(self, ctx: Any) -> Any:
        """A file system without room: all of it is made up."""
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = 4096
        found.f_namemax = 255
        return found

    async def close(self) -> None:
        """Let go of the nodes that are still open."""
        edges = list(self._edges.values())
        self._edges.clear()
        for edge in edges:
            await edge.detach()
