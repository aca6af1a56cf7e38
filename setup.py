"Packaging reads settings.ini, so that every fact about the project stands in one place."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
project = settings["DEFAULT"]

setup(
    name=project["lib_name"],
    version=project["version"],
    description=project["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=project["keywords"],
    author=project["author"],
    author_email=project["author_email"],
    url=project["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["steer_nb*"]),
    package_data={
        "steer_nb.experiments": ["*.safetensors"],
        "steer_nb.visual": ["*.css", "*.js", "*.mplstyle"],
    },
    python_requires=f">={project['min_python']}",
    install_requires=project["requirements"].split(),
    extras_require={
        "dev": project["dev_requirements"].split(),
        "lm_eval": project["lm_eval_requirements"].split(),
        "quantized": project["quantized_requirements"].split(),
        "ray": project["ray_requirements"].split(),
        "serve": project["serve_requirements"].split(),
        "trl": project["trl_requirements"].split(),
        "vllm": project["vllm_requirements"].split(),
        "widget": project["widget_requirements"].split(),
    },
    entry_points={
        "console_scripts": [project["console_scripts"]],
        "lm_eval.models": [project["lm_eval_models"]],
        "vllm.general_plugins": [project["vllm_general_plugins"]],
        "vllm.endpoint_plugins": [project["vllm_endpoint_plugins"]],
    },
)
