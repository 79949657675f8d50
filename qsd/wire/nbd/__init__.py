"""The NBD protocol (proto.md): constants, the server's handshake, the transmission phase's layouts."""
