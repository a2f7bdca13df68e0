# SPDX-License-Identifier: Apache-2.0
"""A front-end in the machine that keeps requests in flight until a file named `stop` exists.

``python pipelined.py SOCKET KEY [reconnect]`` writes blocks and reads the counter in between; each
write has to be answered OK exactly once, in order. Prints how many writes there were and how often
it connected, which is once unless it was told to reconnect.
"""

import os
import sys
import time
from pathlib import Path

from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.rpmb import frame, spec
from vhost_rpmb.rpmb.mac import Authenticator

IN_FLIGHT = 8
TIMEOUT = 300.0
BLOCKS = 512


class Writer:
    def __init__(self, key: bytes) -> None:
        self.key = key
        self.authenticator = Authenticator(key)
        self.acknowledged: int | None = None  # the write counter

    def work(self, client: RpmbClient) -> None:
        """Write until the file exists; raises BackendError where the connection ends."""
        counter = client.read_counter()
        if self.acknowledged is not None:
            # Writes that were durable when the connection ended count, those before it must.
            assert self.acknowledged <= counter <= self.acknowledged + IN_FLIGHT, counter
        self.acknowledged = counter
        sent: dict[int, tuple[int, bytes]] = {}
        while sent or not os.path.exists("stop"):
            while len(sent) < IN_FLIGHT and not os.path.exists("stop"):
                data = b"%-256d" % counter
                request = client.write_request(counter % BLOCKS, data, counter)
                sent[client.submit(request, spec.FRAME_SIZE)] = counter, b""
                counter += 1
                nonce = os.urandom(spec.NONCE_SIZE)
                request = frame.counter_request(nonce)
                sent[client.submit(request, spec.FRAME_SIZE)] = counter, nonce
            client.flush()
            for token, answer in client.answers():
                expected, nonce = sent.pop(token)
                if nonce:
                    found = frame.check_counter(answer, nonce, self.authenticator)
                    # After a kill a read is executed again, when the writes behind it, which are
                    # in flight too, may be durable already.
                    assert expected <= found <= counter, (expected, found, counter)
                else:
                    address = expected % BLOCKS
                    frame.check_write(answer, address, expected, self.authenticator)
                    self.acknowledged = expected + 1
                    Path("acknowledged").write_text(str(self.acknowledged))


def main(socket_path: str, key_path: str, *mode: str) -> None:
    writer = Writer(Path(key_path).read_bytes())
    connections = 0
    while True:
        connections += 1
        try:
            with RpmbClient.connect(socket_path, writer.key, timeout=TIMEOUT) as client:
                writer.work(client)
            break
        except BackendError:
            if not mode:
                raise
            time.sleep(0.1)
    print(writer.acknowledged, connections)


main(*sys.argv[1:])
