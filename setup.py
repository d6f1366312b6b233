"""What pyproject.toml cannot say: `conf/` and `examples/` are installed inside the package, from where they lie."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nemo_opdlm*"]), "nemo_opdlm.conf", "nemo_opdlm.examples"],
    package_dir={"nemo_opdlm.conf": "conf", "nemo_opdlm.examples": "examples"},
)
