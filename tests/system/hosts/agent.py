"""What stands for sshd on a simulated host: runs commands in it for those who ask through a socket.

agent.py serve SOCKET NAME HOSTS_FILE    the host's first process; it ends, and all of the host, with its input
agent.py call FOLDER [OPTIONS] HOST WORDS...    as ssh is called by the launchers of MPI; SOCKET is FOLDER/HOST
agent.py join NUMBER COUNT MTU    bring up eth0 of host NUMBER of COUNT: its address, and who has which
agent.py echo ADDRESS    send back what comes; agent.py ask ADDRESS COUNT prints the median seconds of a round trip
"""

import array
import fcntl
import os
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

LARGEST_COMMAND = 1 << 20
ECHO_PORT = 7
PING_BYTES = 64
NETWORK = "10.77.0."
# Of <linux/sockios.h>, as `ip` from iproute2 would do it: not every machine has that.
SET_FLAGS, SET_ADDRESS, SET_NETMASK, SET_MTU, SET_MAC, SET_NEIGHBOUR = 0x8914, 0x8916, 0x891C, 0x8922, 0x8924, 0x8955
UP, ETHERNET = 1, 1
KNOWN_FOR_EVER = 6  # ATF_COM | ATF_PERM


def serve(path: str, name: str, hosts: str) -> None:
    """Become the host's first process."""
    socket.sethostname(name)
    for words in (
        ("mount", "--bind", hosts, "/etc/hosts"),
        ("mount", "-t", "tmpfs", "none", "/dev/shm"),
    ):
        subprocess.run(words, check=True)
    _set_link("lo", SET_FLAGS, struct.pack("h", UP))
    threading.Thread(target=_end_with_input, daemon=True).start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(64)
        while True:
            caller, _ = listener.accept()
            threading.Thread(target=_answer, args=(caller,), daemon=True).start()


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _answer(caller: socket.socket) -> None:
    with caller:
        command, handles, _, _ = socket.recv_fds(caller, LARGEST_COMMAND, 3)
        status = subprocess.call(("sh", "-c", command.decode()), stdin=handles[0], stdout=handles[1], stderr=handles[2])
        for handle in handles:
            os.close(handle)
        caller.sendall(array.array("i", [status]).tobytes())


def call(folder: str, *words: str) -> int:
    """Run a command on a host with this process's own streams; returns its status."""
    rest = [*words]
    while rest[0].startswith("-"):
        rest.pop(0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as host:
        host.connect(str(Path(folder) / rest[0]))
        socket.send_fds(host, [" ".join(rest[1:]).encode()], [0, 1, 2])
        answer = host.recv(4)
    return array.array("i", answer)[0] & 255 if len(answer) == 4 else 255


def join(number: str, count: str, mtu: str) -> None:
    """Host NUMBER, from 1, has MAC 02:00:00:00:00:NUMBER and the address of that number; so have the others theirs."""
    _set_link("eth0", SET_MAC, _mac(int(number)))
    _set_link("eth0", SET_MTU, struct.pack("i", int(mtu)))
    _set_link("eth0", SET_FLAGS, struct.pack("h", UP))
    _set_link("eth0", SET_ADDRESS, _internet(NETWORK + number))
    _set_link("eth0", SET_NETMASK, _internet("255.255.255.0"))
    for other in range(1, int(count) + 1):
        if other != int(number):
            known = (_internet(f"{NETWORK}{other}"), _mac(other), KNOWN_FOR_EVER, bytes(16), b"eth0")
            _control(SET_NEIGHBOUR, struct.pack("16s16si16s16s", *known))


def _set_link(name: str, what: int, value: bytes) -> None:
    _control(what, struct.pack("16s24s", name.encode(), value))


def _control(what: int, argument: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, what, argument)


def _internet(address: str) -> bytes:
    return struct.pack("hH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def _mac(number: int) -> bytes:
    return struct.pack("h6s8x", ETHERNET, bytes((2, 0, 0, 0, 0, number)))


def echo(address: str) -> None:
    """Answer one connection."""
    with socket.create_server((address, ECHO_PORT)) as listener:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        other, _ = listener.accept()
        with other:
            other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while message := other.recv(PING_BYTES):
                other.sendall(message)


def ask(address: str, count: str) -> None:
    """Print the median seconds until a message has come back."""
    seconds = []
    with socket.create_connection((address, ECHO_PORT)) as other:
        other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(int(count)):
            start = time.perf_counter()
            other.sendall(bytes(PING_BYTES))
            other.recv(PING_BYTES, socket.MSG_WAITALL)
            seconds.append(time.perf_counter() - start)
    print(statistics.median(seconds))


if __name__ == "__main__":
    commands: dict[str, Callable[..., int | None]] = {
        "serve": serve,
        "call": call,
        "join": join,
        "echo": echo,
        "ask": ask,
    }
    sys.exit(commands[sys.argv[1]](*sys.argv[2:]))
