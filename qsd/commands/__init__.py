"""One function per QMP command, called by monitors and by the command line alike."""
