"""A thin door to `kdunet export`: python tools/export_onnx.py RUN -o student.onnx"""

from __future__ import annotations

import sys

from kdunet.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
