"""What pyproject.toml cannot say: the folders beside hfllm/ come with it, inside the package."""

from setuptools import find_packages, setup

BESIDE = ("recipes", "accelerate_configs", "ds_configs")

setup(
    packages=[*find_packages(include=["hfllm", "hfllm.*"]), *(f"hfllm.{folder}" for folder in BESIDE)],
    package_dir={f"hfllm.{folder}": folder for folder in BESIDE},
)
