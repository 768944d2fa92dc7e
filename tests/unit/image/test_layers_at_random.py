"""Random layers, flattened by the code and by a model that is too simple for the same mistakes.

The model keeps one flat dictionary of paths, applies each layer in two sweeps over strings, and knows neither trees nor
offsets. Names and links are few, so that collisions are many.
"""

from __future__ import annotations

import random
import tarfile

import pytest
from fakes.images import directory, entry, hardlink, symlink, tar_of

NAMES = ("a", "b", "c")


class Model:
    """A file system as a dictionary: path to ("dir", mode), ("file", cell) or ("link", target)."""

    def __init__(self):
        self.paths = {}

    def resolve(self, path):
        """Follow symbolic links among the parents, create parents, and return the path; None if that fails."""
        done, todo, links = "", path.split("/"), 0
        while len(todo) > 1:
            here = f"{done}/{todo.pop(0)}".lstrip("/")
            kind, value = self.paths.setdefault(here, ("dir", 0o755))
            if kind == "link":
                done, todo, links = "", value.split("/") + todo, links + 1
            elif kind == "dir":
                done = here
            if kind == "file" or links > 40:
                return None
        return f"{done}/{todo[0]}".lstrip("/")

    def drop(self, path, itself=True):
        for known in list(self.paths):
            if known.startswith(f"{path}/") or (itself and known == path):
                del self.paths[known]

    def put(self, path, value):
        if not (value[0] == "dir" and self.paths.get(path, ("",))[0] == "dir"):
            self.drop(path)
        self.paths[path] = value


def random_path(dice):
    return "/".join(dice.choice(NAMES) for _ in range(dice.randint(1, 3)))


def random_layer(dice, model, number):
    """Return a layer's entries and apply them to the model. Make only what both sides define."""
    markers, additions = [], []
    for _ in range(dice.randint(0, 3)):
        path = random_path(dice)
        parent, _, name = path.rpartition("/")
        if dice.random() < 0.4 and goes_through_directories(model, path):
            markers.append(entry(f"{path}/.wh..wh..opq"))
            model.drop(path, itself=False)
        elif goes_through_directories(model, parent):
            markers.append(entry(f"{parent}/.wh.{name}".lstrip("/")))
            model.drop(path)
    for step in range(dice.randint(0, 8)):
        addition = random_addition(dice, model, f"{number}.{step}")
        if addition:
            additions.append(addition)
    cut = dice.randint(0, len(additions))
    return tar_of(*additions[:cut], *markers, *additions[cut:])


def goes_through_directories(model, path):
    parts = path.split("/") if path else []
    return all(model.paths.get("/".join(parts[:end]), ("",))[0] == "dir" for end in range(1, len(parts) + 1))


def random_addition(dice, model, label):
    path = random_path(dice)
    before = dict(model.paths)
    real = model.resolve(path)
    if real is None:
        model.paths = before
        return None
    kind = dice.choice(("dir", "file", "file", "link", "hard"))
    if kind == "dir":
        mode = dice.choice((0o700, 0o755, 0o1777))
        model.put(real, ("dir", mode))
        return directory(path, mode)
    if kind == "file":
        model.put(real, ("file", [label]))
        return entry(path, label.encode() * 50)
    if kind == "link":
        return random_symlink(dice, model, path, real, before)
    targets = [known for known, value in model.paths.items() if value[0] == "file"]
    target = dice.choice(targets) if targets else ""
    if not target or target == real or target.startswith(f"{real}/"):
        model.paths = before
        return None
    model.put(real, model.paths[target])
    return hardlink(path, target)


def random_symlink(dice, model, path, real, before):
    target = random_path(dice)
    if target == real or target.startswith(f"{real}/"):
        model.paths = before
        return None
    model.put(real, ("link", target))
    return symlink(path, f"/{target}")


def seen_by_model(model):
    """Return comparable values by path. Cells represent inodes."""
    links = {}
    return {
        path: (kind, value[0], links.setdefault(id(value), path)) if kind == "file" else (kind, value)
        for path, (kind, value) in sorted(model.paths.items(), key=lambda item: item[0].split("/"))
    }


def seen_by_us(result):
    found = {}
    for member in result.members:
        if member.isdir():
            found[member.name] = ("dir", member.mode)
        elif member.issym():
            found[member.name] = ("link", member.linkname.lstrip("/"))
        else:
            first = member.linkname if member.type == tarfile.LNKTYPE else member.name
            content = result.read(member.name)
            label = content[: len(content) // 50].decode()
            assert content == label.encode() * 50
            found[member.name] = ("file", label, first)
    return found


@pytest.mark.parametrize("block", range(10))
def test_random_layers_agree_with_the_model(flat, block):
    for seed in range(block * 60, (block + 1) * 60):
        dice, model = random.Random(seed), Model()
        layers = [random_layer(dice, model, number) for number in range(dice.randint(1, 5))]
        assert seen_by_us(flat(*layers)) == seen_by_model(model), f"seed {seed}"
