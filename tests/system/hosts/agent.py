"""What stands for sshd on a simulated host: runs commands in it for those who ask through a socket.

agent.py serve SOCKET NAME HOSTS_FILE    the host's first process; it ends, and all of the host, with its input
agent.py call FOLDER [OPTIONS] HOST WORDS...    as ssh is called by the launchers of MPI; SOCKET is FOLDER/HOST
agent.py echo ADDRESS    send back what comes; agent.py ask ADDRESS COUNT prints the median seconds of a round trip
"""

import array
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

LARGEST_COMMAND = 1 << 20
ECHO_PORT = 7
PING_BYTES = 64


def serve(path: str, name: str, hosts: str) -> None:
    """Become the host's first process."""
    socket.sethostname(name)
    for words in (
        ("mount", "--bind", hosts, "/etc/hosts"),
        ("mount", "-t", "tmpfs", "none", "/dev/shm"),
        ("ip", "link", "set", "lo", "up"),
    ):
        subprocess.run(words, check=True)
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
    sys.exit({"serve": serve, "call": call, "echo": echo, "ask": ask}[sys.argv[1]](*sys.argv[2:]))
