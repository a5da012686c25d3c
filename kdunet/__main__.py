"""`python -m kdunet` is the command `kdunet`."""

from kdunet.cli import main

if __name__ == "__main__":
    main(prog_name="kdunet")
