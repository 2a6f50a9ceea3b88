"""How a server in a job is reached from elsewhere."""

import pytest

from mpillama.server.rendezvous import tunnel


@pytest.mark.parametrize(
    ("host", "login", "command"),
    [
        ("127.0.0.1", "login1", "ssh -N -L 8000:127.0.0.1:8000 -J login1 node7"),
        ("0.0.0.0", "login1", "ssh -N -L 8000:node7:8000 login1"),
        ("127.0.0.1", None, "ssh -N -L 8000:127.0.0.1:8000 node7"),
        ("localhost", None, "ssh -N -L 8000:localhost:8000 node7"),
        ("0.0.0.0", None, "ssh -N -L 8000:127.0.0.1:8000 node7"),
        ("::", None, "ssh -N -L 8000:[::1]:8000 node7"),
        ("10.1.2.3", None, "ssh -N -L 8000:10.1.2.3:8000 node7"),
        ("fd00::7", None, "ssh -N -L 8000:[fd00::7]:8000 node7"),
    ],
)
def test_the_tunnel_goes_by_the_login_node_if_there_is_one(host, login, command):
    assert tunnel(host, 8000, "node7", login) == command
