from configparser import ConfigParser
from setuptools import setup, find_packages

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]

EXTRAS = ("study", "notebooks", "docs", "onnx", "bench", "dev")
extras = {name: cfg[f"{name}_requirements"].split() for name in EXTRAS}
extras["dev"] += [line for name in ("study", "notebooks", "docs", "onnx") for line in extras[name]]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["wlsft", "wlsft.*"]),
    include_package_data=True,
    zip_safe=False,
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    package_data={"wlsft": ["py.typed"]},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["wlsft=wlsft._modidx:d"]},
)
