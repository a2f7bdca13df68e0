# SPDX-License-Identifier: Apache-2.0
"""The demo: ``python -m tests.e2e.demo`` prints the transcript of the story.

A real Linux guest on QEMU uses the device with the unmodified mmc tool. Without a guest kit the
same story runs through this package's client. Exit status: 0 when every step had its expected
result.
"""

from __future__ import annotations

import shlex
import signal
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from tests.e2e.cache import KitUnavailable
from tests.e2e.kit import make_kit
from tests.e2e.story import ClientStage, GuestStage, Stage, StoryError, tell
from tests.e2e.vm import GuestError, qemu_command_line
from tests.support.daemon import installed_daemon


def say(text: str) -> None:
    print(text, flush=True)


def show_command(title: str, command_line: list[str]) -> None:
    """A command line to copy, with a line for each option and its value."""
    text = shlex.quote(command_line[0])
    for previous, word in pairwise(command_line):
        is_value = previous.startswith("-") and "=" not in previous and not word.startswith("-")
        text += (" " if is_value else " \\\n    ") + shlex.quote(word)
    say(f"\n{title}\n\n  {text}")


def main() -> int:
    """Run the demo; return the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as with Ctrl-C
    folder = Path(tempfile.mkdtemp(prefix="vhost-rpmb-demo-"))
    daemon = installed_daemon(folder)
    qemu = None
    start = time.monotonic()
    try:
        stage: Stage
        try:
            kit = make_kit(say=say)
        except KitUnavailable as reason:
            say(f"NO GUEST: {reason}")
            say("The same story runs through this package's own client instead, without a guest.")
            stage = ClientStage(folder, daemon)
        else:
            stage = GuestStage(kit, daemon)
            qemu = qemu_command_line(kit, daemon.socket_path)
            say("guest kit: ready; a Linux guest on QEMU uses the device with the mmc tool")
        tell(stage, say)
    except (StoryError, GuestError, RuntimeError) as error:
        print(f"\ndemo: FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130

    say(f"\n== All steps had their expected results ({time.monotonic() - start:.0f} s)")
    show_command("The daemon was started with", daemon.command_line)
    if qemu is not None:
        show_command("and QEMU, which gives a shell in the guest when started by hand, with", qemu)
    say(f"\nThe device stays in {folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
