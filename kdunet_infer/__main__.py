"""`python -m kdunet_infer` is the command `kdunet-infer`."""

from kdunet_infer.cli import main

if __name__ == "__main__":
    main(prog_name="kdunet-infer")
