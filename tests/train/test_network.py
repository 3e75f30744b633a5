import socket
import sys

import pytest

from nanochat_ray.train import network


@pytest.mark.skipif(sys.platform != "linux", reason="other systems ask for an interface's address in another way")
def test_an_interface_is_found_by_its_address(monkeypatch):
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("192.0.2.1") is None  # an address that documentation alone uses
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "none-such")])
    assert network.interface_of("127.0.0.1") is None


def test_workers_keep_an_interface_that_the_user_set(monkeypatch):
    monkeypatch.setattr(network.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setattr(network, "interface_of", {"10.0.0.7": "eth1"}.get)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")  # so that it is removed again after the test
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    network.choose_interface()
    assert network.os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert network.os.environ["NCCL_SOCKET_IFNAME"] == "=eth1"


def test_a_first_collective_that_fails_says_over_what_and_where_to_look(monkeypatch):
    def fails(tensor):
        raise RuntimeError("NCCL error: unhandled system error\nLast error: socketStartConnect to 172.17.0.1 failed")

    monkeypatch.setattr(network.dist, "all_reduce", fails)
    monkeypatch.setattr(network.ray.train.torch, "get_device", lambda: "cpu")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "docker0")
    with pytest.raises(
        ConnectionError, match=r"over docker0 \(GLOO_SOCKET_IFNAME\): NCCL error: .*NCCL_DEBUG=INFO"
    ) as e:
        network.meet()
    assert "\n" not in str(e.value)
