import importlib.util
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from trimtab_training.demo.gateway import Gateway

STUB = Path(__file__).with_name("stub_gateway.py")


@pytest.fixture(scope="session")
def stub() -> ModuleType:
    """The stub's module; tests of this folder are not a package."""
    spec = importlib.util.spec_from_file_location("trimtab_demo_stub_gateway", STUB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gateway(stub: ModuleType) -> Iterator[Gateway]:
    """A connection to a stub gateway."""
    server = stub.build_server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with Gateway(f"http://127.0.0.1:{server.server_port}", concurrency=4) as connection:
        yield connection
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
