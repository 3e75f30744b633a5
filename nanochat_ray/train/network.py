"""Chooses the network interface of the training workers, and connects them."""

import fcntl
import os
import socket
import struct
from dataclasses import dataclass

import ray
import ray.train.torch
import torch
import torch.distributed as dist

# All ranks must reach a collective within this time, or the workers are restarted. It must be longer than normal waits,
# such as for a checkpoint of gigabytes on its way to a slow store.
TIMEOUT_SECONDS = 600
SIOCGIFADDR = 0x8915  # Linux's ioctl for the address of an interface


def interface_of(address: str) -> str | None:
    """The name of this host's interface with an IPv4 address. None if no interface has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(s.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def choose_interface() -> None:
    """Let gloo and NCCL use the interface that carries this node's Ray address, unless the user set one.

    Otherwise gloo uses the hostname's address, which is 127.0.1.1 on Debian and Ubuntu. Other hosts can't reach it.
    """
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": NCCL takes a plain name as a prefix


def meet() -> None:
    """Run a first collective, in which NCCL connects. Raises ConnectionError that says where to look."""
    try:
        dist.all_reduce(torch.zeros(1, device=ray.train.torch.get_device()))
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as error:
        name = "NCCL" if dist.is_initialized() and dist.get_backend() == "nccl" else "GLOO"
        interface = os.environ.get(f"{name}_SOCKET_IFNAME", "").removeprefix("=") or "any interface"
        raise ConnectionError(
            f"workers don't reach each other over {interface} ({name}_SOCKET_IFNAME): {str(error).splitlines()[0]}; "
            "look at `nanochat-ray doctor`, and with NCCL_DEBUG=INFO at the workers' logs"
        ) from error


class TorchBackend(ray.train.torch.TorchConfig().backend_cls):
    def on_start(self, worker_group, backend_config) -> None:
        try:
            worker_group.execute(choose_interface)  # before the workers connect
            super().on_start(worker_group, backend_config)
        except Exception:
            worker_group._clear_state()  # so that Ray treats the group as not started and frees its resources
            raise


@dataclass
class TorchConfig(ray.train.torch.TorchConfig):
    """Ray Train's process group on the interface that Ray uses."""

    timeout_s: int = TIMEOUT_SECONDS

    @property
    def backend_cls(self):
        return TorchBackend
