"""``python -m mmkernels``: the command ``mmkernels``."""

from mmkernels.cli import main

main()
