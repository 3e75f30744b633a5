"""Starts the service for the command line: checks the port, deploys on the connected Ray, and watches the health."""

import http.client
import json
import logging
import socket
import time
from contextlib import closing

import ray
from ray import serve

from serving.app import has_gpus


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_port(host: str, port: int) -> None:
    """Raise OSError if the port is taken."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen on {address(host, port)}: {error}") from None


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(application: serve.Application, engines: int, host: str, port: int, on_cluster: bool = False) -> None:
    """Deploy the application on the connected Ray, on a cluster with a proxy on each host.

    If there is no room for all engines, a cluster waits for more hosts; one machine raises ValueError.
    """
    kind = "GPU" if has_gpus() else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if engines > there:
        short = f"{engines} engines (models × replicas) need a {kind} each; there are {there}"
        if not on_cluster:
            raise ValueError(short)
        print(f"waiting    {short}; those that have one answer meanwhile", flush=True)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port, "location": "EveryNode" if on_cluster else "HeadOnly"})
    serve.run(application, name="nanochat")


def watch(host: str, port: int) -> None:
    """Print a line when the service's health changes. Runs until it is interrupted."""
    said = "ok"
    while True:
        time.sleep(5)
        # Close the connection from this side, without `Connection: close`. The side that closes first keeps the port
        # for a minute; on the service's side that would keep a restarted front from taking it again.
        with closing(http.client.HTTPConnection(host, port, timeout=15)) as connection:
            try:
                connection.request("GET", "/health")
                status = json.load(connection.getresponse())["status"]
            except (OSError, http.client.HTTPException, ValueError, LookupError):
                status = "the service does not answer"
        if status != said:
            print(f"warning    {status}" if status != "ok" else "serving    again", flush=True)
        said = status
