"""mmkernels as a kernel of the Hugging Face Hub: what the package ``kernels`` loads instead of importing mmkernels.

``scripts/build_hub_kernel.py`` writes the folder. `entry` becomes its ``__init__.py``.
"""
