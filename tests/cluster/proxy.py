"""TCP proxies between relays and database servers that stall and cut.

proxy.py LINKS: the first line of output is the list of ports, one a link. Commands:
{"links": [..], "mode": "pass" | "stall" | "cut"} and {"links": [..], "upstream": PORT}.

stall: connections stay open, and no byte moves in either direction.
cut: open connections are reset, and new ones are closed at once.
"""

import asyncio
import socket
import struct
import sys

import control

CHUNK = 1 << 16
RESET = struct.pack("ii", 1, 0)


class Link:
    """One port in front of one server."""

    def __init__(self):
        self.upstream = None
        self.mode = "pass"
        self.flows = asyncio.Event()
        self.flows.set()
        self.writers = set()
        self.port = None

    async def listen(self):
        server = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def set_mode(self, mode):
        self.mode = mode
        if mode == "stall":
            self.flows.clear()
        else:
            self.flows.set()
        if mode == "cut":
            self.reset_all()

    def set_upstream(self, port):
        self.upstream = port
        self.reset_all()

    def reset_all(self):
        for writer in list(self.writers):
            reset(writer)

    async def accept(self, reader, writer):
        await self.flows.wait()
        if self.mode == "cut" or self.upstream is None:
            reset(writer)
            return
        self.writers.add(writer)
        try:
            server_reader, server_writer = await asyncio.open_connection(
                "127.0.0.1", self.upstream
            )
        except OSError:
            self.writers.discard(writer)
            reset(writer)
            return
        self.writers.add(server_writer)
        try:
            await asyncio.gather(
                self.copy(reader, server_writer), self.copy(server_reader, writer)
            )
        finally:
            for one in (writer, server_writer):
                self.writers.discard(one)
                one.close()

    async def copy(self, reader, writer):
        try:
            while True:
                data = await reader.read(CHUNK)
                # What was read during a stall waits here.
                await self.flows.wait()
                if not data:
                    break
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            reset(writer)


def reset(writer):
    """Closes it with a reset instead of an orderly end."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        except OSError:
            pass
    writer.transport.abort()


async def main(count):
    links = [Link() for _ in range(count)]
    servers = [await link.listen() for link in links]
    control.say([link.port for link in links])

    def handle(command):
        for number in command["links"]:
            if "upstream" in command:
                links[number].set_upstream(command["upstream"])
            if "mode" in command:
                links[number].set_mode(command["mode"])
        return len(servers)

    await control.serve(handle)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
