"""The one compiled part; everything else about the package stands in pyproject.toml.

Optional: where there is no C compiler the installation goes on, and Pillow resizes (docs/decisions/0009). With -O3
it is slower than with -O2: GCC 12 then joins rounds of the loops over taps and lanes (unroll-and-jam).
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "models.resize_passes",
            ["models/resize_passes.c"],
            extra_compile_args=["-std=c11", "-O2", "-ftree-vectorize"],
            optional=True,
        )
    ]
)
