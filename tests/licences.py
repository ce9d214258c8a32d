#!/usr/bin/env python3
"""Holds the licences and sources of all dependencies against deny.toml, where cargo-deny, which does more, is not installed."""

import json
import re
import subprocess
import sys
import tomllib

with open("deny.toml", "rb") as file:
    deny = tomllib.load(file)
allowed, wrong, seen = set(deny["licenses"]["allow"]), [], 0


def fits(licence):
    """Whether an SPDX expression can be met by what is allowed; old ones write / for OR."""
    tokens = re.findall(r"\(|\)|\bAND\b|\bOR\b|[^\s()/]+(?: WITH [^\s()/]+)?|/", licence or "")
    words = {"AND": "and", "OR": "or", "/": "or", "(": "(", ")": ")"}
    return bool(tokens) and eval(" ".join(words.get(token, str(token in allowed)) for token in tokens))


for target in deny["graph"]["targets"]:
    metadata = json.loads(subprocess.run(
        ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", target],
        check=True, capture_output=True).stdout)
    used = {node["id"] for node in metadata["resolve"]["nodes"]}
    for package in metadata["packages"]:
        if package["id"] not in used or package["source"] is None:
            continue
        seen += 1
        name = f"{package['name']} {package['version']}"
        if not fits(package["license"]):
            wrong.append(f"{name}: its licence is {package['license']}")
        if package["source"] != "registry+https://github.com/rust-lang/crates.io-index":
            wrong.append(f"{name}: it comes from {package['source']}")
        if any(re.match(rf"{banned['crate']}$", package["name"]) for banned in deny["bans"]["deny"] if ":" not in banned["crate"]):
            wrong.append(f"{name}: it is banned")
print("\n".join(sorted(set(wrong))) or f"licences and sources of {seen} packages (per target) are as deny.toml says")
sys.exit(bool(wrong))
