# SPDX-License-Identifier: Apache-2.0
"""The extension modules; all other metadata of the package is in pyproject.toml.

``VHOST_RPMB_BUILD_CHECKED=1`` in the environment builds them with the checks of Cython and with
the sanitizers for addresses and undefined behaviour, whose libraries have to be loaded before
Python (see the Makefile). A directive at the head of a .pyx file takes precedence: it must not
disable a check. ``VHOST_RPMB_BUILD_TRACED=1`` builds them with line tracing for ``make coverage``.
"""

import os
import sys
import sysconfig
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

# An isolated build does not have the source folder on the path, but the man page is generated from
# the parser in vhost_rpmb.cli.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

# Module in vhost_rpmb._fast -> libraries to link.
MODULES: dict[str, list[str]] = {
    "memory": [],
    "library": [],
    "inflight": [],
    "ring": [],
    "split": [],
    "packed": [],
    "virtqueue": [],
    "loop": [],
    "mac": ["crypto"],
    "batch": ["crypto"],
    "device": ["crypto"],
}

# -isystem: Python's own headers (3.13) cause some of these warnings.
compile_args = "-Wall -Wextra -Wconversion -Wsign-conversion -isystem "
compile_args += sysconfig.get_path("include")
link_args = ""
if os.environ.get("VHOST_RPMB_BUILD_CHECKED") == "1":
    build_dir: str | None = "build/checked"
    # No overflowcheck: lengths are checked in a form in which unsigned numbers may wrap.
    # No nonecheck: Cython does not support it in code without the GIL.
    directives = {"boundscheck": True}
    link_args = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    compile_args += f" -O1 -g -UNDEBUG -fno-omit-frame-pointer {link_args}"
elif os.environ.get("VHOST_RPMB_BUILD_TRACED") == "1":
    build_dir = None  # the reports need the C files beside the sources
    directives = {"linetrace": True}
    # -w: the generated tracing code causes warnings.
    compile_args += " -O1 -w -DCYTHON_TRACE=1 -DCYTHON_TRACE_NOGIL=1"
else:
    build_dir = "build/plain"
    directives = {}
    compile_args += " -O2"

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"vhost_rpmb._fast.{name}",
                [f"vhost_rpmb/_fast/{name}.pyx"],
                include_dirs=["vhost_rpmb/_fast"],
                depends=sorted(glob("vhost_rpmb/_fast/*.h")),
                libraries=libraries,
                extra_compile_args=compile_args.split(),
                extra_link_args=link_args.split(),
            )
            for name, libraries in MODULES.items()
        ],
        build_dir=build_dir,
        compiler_directives={"language_level": 3, **directives},
    )
)
