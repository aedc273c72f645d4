"""A thin driver of CMake: everything else is in pyproject.toml and CMakeLists.txt. It never imports torch."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Options of CMakeLists.txt that the environment may set.
CHOICES = ("PERSONAFAST_CUDA", "PERSONAFAST_CUDA_ARCHS")


class CMakeExtension(Extension):
    def __init__(self, name):
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, extension):
        import pybind11

        # get_ext_fullpath is the build folder of a wheel, or the source tree of an editable install.
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve() / target.stem
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPERSONAFAST_VERSION={self.distribution.get_version()}",
            *(f"-D{name}={os.environ[name]}" for name in CHOICES if os.environ.get(name)),
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    packages=[*find_packages(include=["personafast", "personafast.*"]), "personafast._triton"],
    package_dir={"personafast._triton": "triton_kernels"},
    package_data={"personafast": ["py.typed", "zoo/data/**/*"]},
    include_package_data=False,
    ext_modules=[CMakeExtension("personafast._C")],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
