"""erpm.py makes a large pretrained image classifier robust to real-world shift, cheaply, and
without losing what the model already knew.

    python erpm.py demo                                       # everything, on data made here, CPU
    python erpm.py eval --model timm:resnet50.tv_in1k --set folder-c:photos      # a report card
    torchrun --nproc-per-node 8 erpm.py distill --recipe imagenet-rn101 data.root=/data
    python erpm.py COMMAND --help                             # every key, its default and meaning

                                        +-> original tail + head (frozen) -> z0   teacher of "clean"
    images --> frozen backbone, once ---+
    x and x~ = augment(x)               +-> shared tail --+-> clean head      <- x    [A] eq. 3
         |                                  (tuned,       +-> combined head   <- x, x~
         |                                   dropout)     +-> robust head     <- x~   [A] eq. 4
         +--> small robust network -> zt                          teacher of "robust"
    At inference T dropout passes of tail and heads give sigma; sigma and the KL divergence to the
    combined head choose whether the clean or the robust head answers ([A] eq. 6).

Sections: 1. BASICS, 2. CONFIG, 3. CORRUPTIONS, 4. AUGMENTATIONS, 5. DATA, 6. MODELS, 7. METHOD,
    8. TRAINING, 9. EVALUATION, 10. REPORT, 11. BENCH, 12. COMMANDS.

Papers:
    [A] Jain, Behl, Rawat, Vineet. Efficiently Robustify Pre-Trained Models. ICCV 2023.
    [B] Zhou, Wang, Wang, Wang. Distilling Out-of-Distribution Robustness from Vision-Language
        Foundation Models. NeurIPS 2023.
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import operator
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
import yaml
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm


# ==== 1. BASICS ====
# Errors for people, seeds as functions of keys, and what a process knows of its siblings.
# Nothing here moves a global generator.


class UserError(Exception):
    """A mistake that a person can mend: the message says what, where and what to do (exit 2)."""


def choose(table, name: str, what: str):
    """table[name], or the name itself where the table is no dict.  Raises: UserError."""
    if name not in table:
        close = difflib.get_close_matches(str(name), list(table), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = ", ".join(table) if len(table) < 50 else f"{len(table):,} names"
        raise UserError(f"unknown {what} {name!r}{hint} (known: {known})")
    return table[name] if isinstance(table, dict) else name


def fold(*key) -> int:
    """63-bit seed, a function of the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rng(*key, device="cpu") -> torch.Generator:
    """Generator whose stream is a function of the key alone."""
    return torch.Generator(device).manual_seed(fold(*key))


def _key(generator: torch.Generator) -> int:
    """The next number of the generator: a seed for NumPy, torchvision or a hash."""
    return torch.randint(2**62, (), generator=generator, device=generator.device).item()


@contextlib.contextmanager
def seeded(*key):
    """Context in which the global CPU generator, torchvision's, is a function of the key."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(fold(*key))  # torch.manual_seed moves GPUs' as well
        yield


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def pick_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gathered(thing=None) -> list:
    """What each process has brought, plain data; returns when every process is here."""
    found = [thing] * world()[1]
    if len(found) > 1:
        dist.all_gather_object(found, thing)
    return found


def say(text: str) -> None:
    """Prints a line on the first process only."""
    if world()[0] == 0:
        (tqdm.write if sys.stderr.isatty() else print)(text)
        sys.stdout.flush()


class Progress(tqdm):
    """tqdm in images, on the first process; where there is no terminal, a line each 8 s.  In its
    context signals only set `hit`, for the loop to raise KeyboardInterrupt at a safe point."""
    monitor_interval = 0                       # no thread of its own
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    hit = 0                                    # the last signal of the process, or none

    def __init__(self, total: int, what: str, start: int = 0):
        super().__init__(total=total, initial=start, desc=what, leave=False, unit=" images",
                         miniters=1, mininterval=0.2 if sys.stderr.isatty() else 8,
                         disable=world()[0] != 0)

    def display(self, msg=None, pos=None):
        if sys.stderr.isatty():
            return super().display(msg, pos)
        if self.n > self.initial:
            print(self, flush=True)

    def __enter__(self):
        def note(number, frame):
            Progress.hit = number
            signal.signal(signal.SIGINT, signal.default_int_handler)   # the second one is impatient
        Progress.hit, self.old = 0, [signal.signal(s, note) for s in self.signals]
        return self

    def __exit__(self, *exc):
        for s, handler in zip(self.signals, self.old):
            signal.signal(s, handler)
        self.close()


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes the file whole or not at all: a full disk leaves the old one, no reader sees half."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {e}") from None


def read_lines(path: Path | str) -> list[str]:
    """The lines of a text file that are not empty.  Raises: OSError; UnicodeDecodeError."""
    return list(filter(None, map(str.strip, Path(path).read_text("utf-8").splitlines())))


def sha(*parts) -> str:
    """First 16 hex digits of the SHA-256 of all parts: text, bytes, tensors by name."""
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict):
            part = sha(*itertools.chain.from_iterable(sorted(part.items())))
        elif isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        h.update(part.encode() if isinstance(part, str) else part)
    return h.hexdigest()[:16]


def _walk(top: Path | str, times: dict[str, int], seen: Sequence[str] = ()) -> list[str]:
    """As pictures_below; notes also each folder's time of change, which no tool sets back."""
    real, kinds = os.path.realpath(top), torchvision.datasets.folder.IMG_EXTENSIONS
    if not os.path.isdir(top) or real in seen:
        return []
    times[str(top)] = os.stat(top).st_ctime_ns
    entries = [e for e in sorted(os.scandir(top), key=lambda e: e.name) if e.name[0] != "."]
    found = [e.path for e in entries if e.name.lower().endswith(kinds) and e.is_file()]
    for folder in (e.path for e in entries if e.is_dir()):
        found += _walk(folder, times, (*seen, real))
    return found


def pictures_below(top: Path | str, long: int = 10 ** 5) -> list[str]:
    """The picture files below a folder (none if it is absent), sorted, without hidden ones; a link
    to a folder that it lies in is passed over.  A long list is kept in torch's cache: it holds
    until a folder has another time.  Raises: OSError."""
    kept = Path(torch.hub.get_dir(), "erpm", sha(*map(os.fsencode, (top, os.path.realpath(top)))))
    with contextlib.suppress(OSError, ValueError, TypeError):
        seal, text = kept.read_text().split("\n")
        times, found = json.loads(text)
        if seal == sha(text) and all(os.stat(f).st_ctime_ns == t for f, t in times.items()):
            return found
    found = _walk(top, times := {})
    if len(found) > long and max(times.values()) < time.time_ns() - 2e9:     # at rest
        with contextlib.suppress(UserError):
            text = json.dumps([times, found])
            write_atomically(kept, f"{sha(text)}\n{text}")
    return found


def read_picture(path: Path | str) -> Image.Image:
    """The picture in RGB; 16-bit grey is scaled to 8 bit, not clipped.  Raises: UserError."""
    try:
        with Image.open(path) as im:
            if im.format == "PNG":
                Image.open(path).verify()                # its sums, which decoding passes over
            if im.mode[0] in "IF":
                grey = np.asarray(im)
                if im.mode == "F" or grey.min() < 0 or not 255 < grey.max() <= 65535:
                    raise ValueError(f"mode {im.mode} has no known range: save it with 8 or 16 bit")
                im = Image.fromarray((grey / 257 + 0.5).astype(np.uint8))
            return im.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"cannot read the image {path} ({e}): mend or remove it") from None


def decode(path: Path | str) -> Tensor:
    """The picture, uint8 (3,H,W), for training: a JPEG by torchvision, 1.7 times as fast through a
    random crop and within a grey level; all else, and once that decoder is gone, by Pillow."""
    tv, most, at = torchvision.io, Image.MAX_IMAGE_PIXELS or math.inf, 2
    with contextlib.suppress(RuntimeError, AttributeError, OSError, IndexError):
        data = bytearray(Path(path).read_bytes())
        while data[at] == 0xFF and not 0xC0 <= data[at + 1] <= 0xC3:     # up to the size
            at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2:at + 4])
        h, w = (int.from_bytes(data[i:i + 2]) for i in (at + 5, at + 7))
        if data[:2] == b"\xff\xd8" and data[at] == 0xFF and h * w < most:
            return tv.decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), tv.ImageReadMode.RGB)
    return v2.functional.pil_to_tensor(read_picture(path))


def unreadable(path: str) -> str:
    """The path of a file that `read_picture` refuses, else ""."""
    with contextlib.suppress(UserError):
        read_picture(path)
        return ""
    return path


@functools.cache
def versions() -> dict[str, str]:
    """What a result depends on; this file is read once, for it may be edited during a long run."""
    return {"erpm": sha(Path(__file__).read_bytes()), "python": sys.version.split()[0],
            **{m.__name__: m.__version__ for m in (torch, torchvision, np)}}


# ==== 2. CONFIG ====
# The frozen dataclasses are schema, default, type, range and help.  config.yaml holds recipes:
# what differs from the defaults.  Precedence: default < recipe (or the run's file) < key=value.


def opt(default, text: str, *valid):
    """Dataclass field: default, help text and what is valid beside it: (least, most), or words."""
    return dataclasses.field(default=default, metadata={"help": text, "valid": valid})


@dataclass(frozen=True)
class Data:
    """The training set, and how pictures become squares."""
    name: str = opt("shapes", "training set, one of `python erpm.py sets`, or folder:PATH")
    root: str = opt("data", "folder that holds the data sets")
    size_px: int = opt(0, "side of the square images that networks see; 0 = their own", 32, 512)
    fit: str = opt("", "crop, or squash both sides; empty = the network's", "", "crop", "squash")
    crop: bool = opt(True, "training: random crops (stored images: shifts by up to 1/8)")
    flip: bool = opt(True, "training: mirror half of the images; wrong for digits and letters")
    names: str = opt("", "file of class names for prompts, in label order; empty = the set's own")
    n_train: int = opt(0, "training images at most (drawn by seed 0); 0 = all", 0, 10 ** 9)
    n_test: int = opt(0, "images at most of each scored set; 0 = all", 0, 10 ** 9)
    allow_partial: bool = opt(False, "score a set whose number of images is not the published one")
    on_bad_image: str = opt("stop", "skip = train without spoilt pictures", "stop", "skip")
    workers: int = opt(0, "loader processes; images decoded from files want 4 or more", 0, 256)


@dataclass(frozen=True)
class Model:
    """The two networks.  A name with a pretrained tag (timm:resnet50.tv_in1k) loads its weights."""
    student: str = opt("cifar:resnet8-w2-s2", "the large network M of [A]")
    student_weights: str = opt("", "file that it starts from; empty = by tag, or made by pretrain")
    teacher: str = opt("cifar:resnet8-s2", "the small network M_t of [A]")
    teacher_weights: str = opt("", "file that it starts from; empty = by tag, or random")
    head: str = opt("linear", "text = zero-shot, prompts classify (open_clip:)", "linear", "text")
    templates: str = opt("", "file of prompt templates, a line each with {} for the class")


@dataclass(frozen=True)
class Train:
    """One training stage."""
    epochs: float = opt(8.0, "passes over the stage's images", 1e-3, 1e5)
    n_images: int = opt(0, "training images of this stage at most; 0 = all", 0, 10 ** 9)
    batch: int = opt(128, "images a step, over all processes", 1, 10 ** 6)
    accum: int = opt(1, "micro-batches that a step is made of", 1, 10 ** 4)
    optimizer: str = opt("adamw", "sgd has momentum 0.9, Nesterov", "adamw", "sgd")
    lr: float = opt(3e-3, "peak learning rate; cosine to zero", 1e-9, 100)
    weight_decay: float = opt(0.05, "decoupled for adamw; none on biases and norms", 0, 10)
    warmup: float = opt(0.5, "epochs of linear warm-up", 0, 1e5)
    clip: float = opt(1.0, "largest gradient norm; 0 = off", 0, 1e6)
    ema: float = opt(0.0, "decay of the averaged weights that are kept; 0 = off", 0, 0.999999)
    smoothing: float = opt(0.0, "label smoothing", 0, 0.9)


@dataclass(frozen=True)
class Pretrain(Train):
    """How the student learns clean data, where its name has no pretrained weights for them."""
    tune: int = opt(-1, "-1 = all of it is trained, 0 = a linear probe of its features", -1, 0)


@dataclass(frozen=True)
class Robustify(Train):
    """How the small teacher is made robust; its augmentation also makes x~ for distill."""
    method: str = opt("augment", "augment = on augmented images; kd, dad = as [B]; none = as it is",
                      "augment", "none", "kd", "dad")
    augment: str = opt("pixmix+augmix", "augmentations, joined by +")
    severity: float = opt(3.0, "strength of augmix; its authors: 1 on ImageNet, 3 on CIFAR", .1, 10)
    pictures: str = opt("", "pixmix: folder of pictures to mix in; empty = made here")
    clean: bool = opt(True, "train on x beside x~; without, twice the epochs cost the same")
    jsd: float = opt(0.0, "weight of AugMix's consistency of x, x~, x~; 0 = off", 0, 1000)
    teacher: str = opt("", "kd, dad: the network to learn from; empty = model.student")
    teacher_weights: str = opt("", "file that it starts from; empty = by tag")
    temperature: float = opt(4.0, "kd, dad: softmax temperature", 0.01, 100)
    radius: float = opt(0.1, "dad: L2 norm of what is added to an image in [0, 1]", 0, 1000)
    step: float = opt(0.1, "dad: L2 norm of an ascent step", 0, 1000)
    steps: int = opt(1, "dad: ascent steps", 0, 1000)
    start: float = opt(0.8, "dad: probability of a random start", 0, 1)
    through: bool = opt(False, "dad: the gradient crosses the quantiser, straight through")
    samples: bool = opt(False, "dad: samples are made once and kept; else new ones every epoch")


@dataclass(frozen=True)
class Vqgan(Train):
    """The VQGAN of robustify.method=dad, and how it is trained where it has no weights."""
    name: str = opt("tiny_f2_256", "one of VQGANS, or a YAML file of taming-transformers")
    weights: str = opt("", "file of its weights; empty = trained on the images first")


@dataclass(frozen=True)
class Distill(Train):
    """How the large network is tuned.  tune = last stages tuned, head = of these, own a head."""
    method: str = opt("erpm", "erpm = [A]; team = ours; apt = a tail alone; lp = the Linear; "
                              "ft = all; vpt = a ViT's prompts; none = (compare) the teacher alone",
                      "none", "erpm", "team", "apt", "lp", "ft", "lp-ft", "wise", "vpt")
    tune: int = opt(3, "last stages that are tuned", 0, 1000)
    head: int = opt(3, "of these at most, the last ones that each head has for itself", 0, 1000)
    dropout: float = opt(0.1, "rate in the tuned part and before classifiers", 1e-3, 0.99)
    norms: str = opt("frozen", "tuned BatchNorm: own = of each head's images", "frozen", "own")
    dropout_in: str = opt("tail", "head = before the classifiers alone", "tail", "head")
    alpha: float = opt(0.5, "weight of the distillation loss; 0 = no distillation", 0, 1)
    temperature: float = opt(2.0, "softmax temperature of the distillation", 0.01, 100)
    wise: float = opt(0.5, "wise: share of the fine-tuned weights", 0, 1)
    views: int = opt(0, "augmented views whose features are kept on disk; 0 = off", 0, 10000)
    prompts: int = opt(10, "vpt: prompt tokens", 0, 1000)
    deep: bool = opt(True, "vpt: new tokens before every block, else before the first")


@dataclass(frozen=True)
class Compare:
    """What `compare` and `demo` run."""
    seeds: int = opt(1, "seeds 0, 1, ... of every run", 1, 1000)
    rows: str = opt("", "a line a run, LABEL: KEY=VALUE ...; without settings it is the recipe's "
                        "own, or that of the label above.  '# TITLE; NOTE' begins a table")

    @property
    def plan(self) -> tuple[dict[str, list[str]], dict[str, dict[str, str]]]:
        """({"title; note": labels}, {label: {"section.key": text}})."""
        tables, runs, title = {}, {}, "Methods"
        for line in filter(None, map(str.strip, self.rows.splitlines())):
            if line.startswith("#"):
                title = line.strip("# ")
                continue
            *label, words = line.split(":", 1)               # without a colon all are settings
            label, own = "".join(label), dict(w.partition("=")[::2] for w in words.split())
            if runs.setdefault(label, own) != own and own:
                raise UserError(f"compare.rows: {label} has other settings in another line")
            tables.setdefault(title, []).append(label)
        return tables, runs or {"": {}}


@dataclass(frozen=True)
class Eval:
    """What is scored and how."""
    sets: str = opt("", "joined by commas, or all; empty = the training set, its -c, its -r")
    models: str = opt("", "instead of a run, by commas: [LABEL@]NAME[=FILE] or run:FOLDER")
    head: str = opt("auto", "auto = its own on its own classes, else prompts or linear probe; "
                            "own = its outputs are the set's, you say so", "auto", "own", "probe")
    rule: str = opt("product", "selection rule of the headline figure; all rules are recorded")
    passes: int = opt(10, "dropout passes; 0 = closed form", 0, 1000)
    n_cell: int = opt(0, "images a cell of a generated -c set, others in each; 0 = all", 0, 10 ** 9)
    batch: int = opt(256, "images a forward", 1, 10 ** 6)


@dataclass(frozen=True)
class Runtime:
    """What changes speed and safety, not meaning."""
    amp: str = opt("auto", "autocast type of networks", "auto", "bf16", "fp16", "none")
    offline: bool = opt(False, "no hub is asked: a name whose weights are not on disk is an error")
    log_every: int = opt(20, "steps between lines of log.jsonl", 1, 10 ** 9)
    save_every: int = opt(200, "steps between checkpoints", 1, 10 ** 9)


@dataclass(frozen=True)
class Config:
    """Everything.  `python erpm.py COMMAND section.key=value ...` changes it."""
    run: str = opt("", "name of the run; empty = recipe or data set, seed if not 0")
    out: str = opt("runs", "folder of the runs")
    seed: int = opt(0, "seed of everything but the cuts of the data", 0, 2 ** 31)
    data: Data = Data()
    model: Model = Model()
    pretrain: Pretrain = Pretrain()
    robustify: Robustify = Robustify()
    vqgan: Vqgan = Vqgan()
    distill: Distill = Distill()
    compare: Compare = Compare()
    eval: Eval = Eval()
    runtime: Runtime = Runtime()

    @property
    def dir(self) -> Path:
        return Path(self.out) / self.run


PARTS = {name: part for name, part in vars(Config()).items() if dataclasses.is_dataclass(part)}
FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.name not in PARTS} | {
    f"{name}.{f.name}": f for name, part in PARTS.items() for f in dataclasses.fields(part)}


class Words(yaml.BaseLoader):
    """YAML whose values stay text, as on the command line: `no` is no False, 12:30 no 750.  A key
    that stands twice is refused (plain YAML keeps the last silently)."""

    def construct_mapping(self, node, deep=False):
        keys = [k.value for k, _ in node.value]
        if twice := [k for k in keys if keys.count(k) > 1]:
            raise ValueError(f"line {node.start_mark.line + 1}: {twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, loader: type = Words) -> dict:
    """The file's mapping.  Raises: UserError, also where a first line "# sha256 ..." is wrong."""
    try:
        text = path.read_text()
        tree = dict(yaml.load(text, loader))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: expected a mapping in YAML: {' '.join(str(e).split())}") from None
    seal, _, rest = text.partition("\n")
    if seal.startswith("# sha256 ") and seal != f"# sha256 {sha(rest)}":
        raise UserError(f"{path} is damaged or was edited: give KEY=VALUE instead, or delete its "
                        "first line where the settings are right")
    return tree


def typed(value, path: str, where: str):
    """value, or its text, as the type of a field and within its range.  Raises: UserError."""
    field = choose(FIELDS, path, f"setting in {where}:")
    kind, valid, text, more = field.type, field.metadata["valid"], str(value), ""
    if kind == "str" and isinstance(value, str):
        return choose(valid or (value,), value, path)
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in ("int", "float"):
        more = f" of {valid[0]:g} to {valid[1]:g} (default {field.default:g})"
        with contextlib.suppress(ValueError):
            number = int(text) if kind == "int" else float(text)
            if valid[0] <= number <= valid[1] or number == field.default:
                return number
    raise UserError(f"{where}: {path}: expected {kind}{more}, got {value!r}")


def changed(cfg: Config, given: dict, where: str = "settings", processes: int = 1) -> Config:
    """The Config with other values, {"section.key": value} or YAML's {"section": {"key": value}}.
    Raises: UserError; also where valid values do not go together, or with so many processes."""
    if not isinstance(given, dict):
        raise UserError(f"{where}: expected a mapping of settings, got {given!r}")
    for path, value in given.items():
        nested = isinstance(value, dict)
        flat = {f"{path}.{k}": v for k, v in value.items()} if nested else {str(path): value}
        for key, v in flat.items():
            section, _, leaf = key.rpartition(".")
            new = {leaf: typed(v, key, where)}
            if section:
                new = {section: dataclasses.replace(getattr(cfg, section), **new)}
            cfg = dataclasses.replace(cfg, **new)
    for name, stage in vars(cfg).items():
        if isinstance(stage, Train) and stage.batch % (stage.accum * processes):
            raise UserError(f"{name}.batch: {stage.batch} images cannot be shared equally by "
                            f"{processes} processes and {name}.accum={stage.accum} micro-batches")
    return cfg


def slug(text: str) -> str:
    """The text as a file's name."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


def resolve(words: Sequence[str] = (), recipe: str = "", file: Path | str = "") -> Config:
    """The frozen Config: default < recipe of the file (without one the whole file) < words."""
    base = Config()
    if recipe or file:
        file = Path(file or Path(__file__).with_name("config.yaml"))
        tree = read_yaml(file)
        tree = choose(tree, recipe, f"recipe in {file}") if recipe else tree
        base = changed(base, tree, f"{file} {recipe}".strip())
    cfg = changed(base, dict(w.partition("=")[::2] for w in words), "command line")
    name = recipe or cfg.data.name
    if recipe and cfg.data.name != base.data.name:
        name += f"-{cfg.data.name}"
    if cfg.seed:
        name += f"-s{cfg.seed}"
    return cfg if cfg.run else dataclasses.replace(cfg, run=slug(name))


# ==== 3. CORRUPTIONS ====
# ImageNet-C's 15, batched: each takes x uint8 (B,3,H,W) on any device, constants c of a severity,
# and gens, a CPU generator for each image, a function of (seed, image index, name, severity).


SMALL_PX = 64  # images whose longer side is at most this get CIFAR-10-C's constants


def on_cpu(x):
    """Whether parts of a batch go one by one through a CPU's cache; else all at once."""
    return x.device.type == "cpu"


def slices(x, size):
    """Slices of a batch, of `size` values each to stay in a CPU's cache; on a GPU one."""
    n = max(1, size // x.shape[1:].numel() if on_cpu(x) else len(x))
    return [slice(i, i + n) for i in range(0, len(x), n)]


def on(x, values, dtype=None):
    """NumPy's or a list's values on x's device, which the host does not wait for."""
    values = torch.as_tensor(values, dtype=dtype)
    return (values.pin_memory() if x.is_cuda else values).to(x.device, non_blocking=True)


def draw(gens, shape, fill, *args, near=None):
    """(B,*shape) on the device of `near`: row k is a function of generator k alone, which fills it
    on a CPU; elsewhere all rows are one hash of its next number and the place (SplitMix64)."""
    if near is None or on_cpu(near):
        out = torch.empty(len(gens), *shape, dtype=torch.int32 if fill == "random_" else None)
        for g, row in zip(gens, out):
            getattr(row, fill)(*args, generator=g)
        return out
    n, (a, b) = math.prod(shape), args or (0, 1)
    z = on(near, [_key(g) for g in gens])[:, None]
    z = z + torch.arange(n, device=z.device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
    u = ((z >> 41 & 0x7FFFFF) + 0.5) / 2 ** 23  # in (0, 1)
    u = a + b * torch.special.ndtri(u) if fill == "normal_" else a + (b - a) * u
    return (u.int() if fill == "random_" else u).view(-1, *shape)


def truncate(y):
    """uint8 of float values on 0..255, cut and not rounded as the published files are;
    overwrites y.  1/512 absorbs the float error that makes 99 of 100; int16 is for speed."""
    return y.add_(1 / 512).clamp_(0, 255).to(torch.int16).to(torch.uint8)


def gaussian_noise(x, c, gens):
    """x + noise of standard deviation c."""
    return truncate(draw(gens, x.shape[1:], "normal_", near=x).mul_(255 * c).add_(x))


def shot_noise(x, c, gens):
    """Poisson counts with c photons at white."""
    if on_cpu(x):
        rates = x.float().mul_(c / 255)
        counts = torch.stack([torch.poisson(r, generator=g) for r, g in zip(rates, gens)])
    else:  # a row of the distribution a grey level, one above the other
        most = int(c + 10 * c ** 0.5 + 20)
        grey, k = torch.arange(256.0, dtype=torch.float64)[:, None], torch.arange(1.0, most + 1)
        rows = on(x, (torch.special.gammaincc(k.double(), grey * c / 255) + grey).flatten())
        u = draw(gens, x.shape[1:], "uniform_", near=x)
        counts = (torch.searchsorted(rows, x + u.double()) - x.long() * most).float()
    return truncate(counts.mul_(255 / c))


def impulse_noise(x, c, gens):
    """A share c of the elements (not pixels) set to 0 or 255."""
    u = draw(gens, x.shape[1:], "uniform_", near=x)
    return x.masked_fill(u < c, 255).masked_fill_(u < c / 2, 0)


def defocus_blur(x, c, gens):
    """Disk blur, mirrored about the edge pixel; c = radius, and sigma of a Gaussian over the
    disk that mirrors it at its own edge: at radius 8 and 10 this brightens by 1 %."""
    (h, w), (radius, sigma) = x.shape[-2:], c
    r, size = max(8, radius), 3 if radius <= 8 else 5
    g = torch.arange(-r, r + 1)
    disk = (g[:, None] ** 2 + g ** 2 <= radius ** 2).float()
    disk = v2.functional.gaussian_blur((disk / disk.sum())[None], size, sigma)
    y = F.pad(x.float(), (16,) * 4, mode="reflect")  # 224 px to 256: a quick transform
    side, r = y.shape[-2:], r + 16
    spectrum = torch.fft.rfft2(y).mul_(torch.fft.rfft2(on(x, disk), s=side))
    return truncate(torch.fft.irfft2(spectrum, s=side)[..., r:r + h, r:r + w])


def gaussian(x, sigma, cut=4, edge="edge"):
    """Gaussian blur of (B,C,H,W), cut at so many sigma; edge: np.pad's mode.  By plane, on a
    GPU in float64: a batched product rounds by its batch."""
    r, blur = int(cut * sigma + 0.5), {}
    taps = np.exp(-0.5 * (np.arange(-r, r + 1) / max(sigma, 1e-9)) ** 2)
    taps = torch.from_numpy(taps / taps.sum()).float()
    for n in set(x.shape[-2:]):
        i = torch.from_numpy(np.pad(np.arange(n), r, edge)).unfold(0, 2 * r + 1, 1)  # (n, taps)
        blur[n] = on(x, torch.zeros(n, n).scatter_add_(1, i, taps.expand(n, -1)))
    rows, columns = (blur[n] for n in x.shape[-2:])
    if not on_cpu(x):
        return (rows.double() @ x.double() @ columns.T.double()).float()
    return torch.stack([rows @ y @ columns.T for y in x.float().flatten(0, 1)]).view(x.shape)


def glass_blur(x, c, gens):
    """Gaussian, local shuffle, Gaussian; c = sigma, reach, passes. The shuffle goes through the
    pixels in reverse raster order and copies into each (the reference's swap of two views is a
    copy) the pixel at a random offset, which may itself be a copy made earlier in the pass.
    Pointer doubling follows such chains, up to 32 links."""
    sigma, d, passes = c
    n, _, h, w = x.shape
    source = here = torch.arange(n * h * w, dtype=torch.int32, device=x.device)
    active = torch.zeros(n, h, w, dtype=torch.int32, device=x.device)
    active[:, d + 1:h - d + 1, d + 1:w - d + 1] = 1  # where the shuffle writes
    active, steps = active.flatten(), torch.arange(-d, d, dtype=torch.int32, device=x.device)
    steps = (steps[:, None] * w + steps).flatten()  # in pixel numbers; never d: as there
    for _ in range(passes):
        pick = draw(gens, (h * w,), "random_", 0, 4 * d * d, near=x)
        step = steps.index_select(0, pick.flatten()).mul_(active)
        j = here + step
        made = active.index_select(0, j).mul_(step > 0)  # 1: j was written in this pass
        link = step.mul_(made).add_(here)
        for _ in range(5):
            link = link.index_select(0, link)
        source = source.index_select(0, j.index_select(0, link))
    y = truncate(gaussian(x, sigma)).transpose(0, 1).reshape(3, -1).index_select(1, source)
    return truncate(gaussian(y.view(3, n, h, w).transpose(0, 1), sigma))


def motion_blur(x, c, gens, low=-45, high=45):
    """Smear along an angle of low to high degrees, as ImageMagick does; c = radius and sigma of a
    one-sided Gaussian of 2 radius + 1 taps at whole pixels, edge repeated: the content shifts."""
    (h, w), reach = x.shape[-2:], 2 * c[0]
    taps = np.exp(-0.5 * (np.arange(reach + 1) / c[1]) ** 2)
    padded = F.pad(x.float(), (reach,) * 4, mode="replicate")
    out = torch.zeros_like(x, dtype=torch.float32)
    angle = np.deg2rad(draw(gens, (), "uniform_", low, high).numpy().astype(float))
    steps = np.arange(reach + 1)[:, None, None] * np.stack([np.sin(angle), np.cos(angle)], 1)
    corners = reach + np.ceil(steps - 0.5).astype(int)  # (taps,B,2)
    for s in slices(x, 2 ** 16):  # on a CPU few at a time, in its cache
        images, total = padded[s].unbind(), out[s]
        for at, tap in zip(corners[:, s].tolist(), (taps / taps.sum()).tolist()):
            moved = [p[:, i:i + h, j:j + w] for p, (i, j) in zip(images, at)]
            total.add_(torch.stack(moved) if len(moved) > 1 else moved[0][None], alpha=tap)
    return truncate(out)


def enlarge(x, zoom, h, w):
    """(N,1,h,w): planes enlarged with aligned corners to round(side * zoom), and trimmed; images
    would be rounded by the number of threads, and take twice as long."""
    size = [round(n * zoom) for n in x.shape[-2:]]
    y = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    return y[..., (size[0] - h) // 2:, (size[1] - w) // 2:][..., :h, :w]


def zoom_blur(x, c, gens):
    """Mean of the image, twice, and of its centre enlarged up to c0 in steps of c1."""
    (h, w), y, factors = x.shape[-2:], x.float().flatten(0, 1)[:, None], np.arange(1, *c)
    total = y.clone()
    for zoom in factors:  # 1 is among them
        rows, columns = math.ceil(h / zoom), math.ceil(w / zoom)
        top, left = (h - rows) // 2, (w - columns) // 2
        total += enlarge(y[..., top:top + rows, left:left + columns], zoom, h, w)
    return truncate(total / (len(factors) + 1)).view(x.shape)


def snow(x, c, gens):
    """Whitened image + flakes (thresholded noise, enlarged, smeared), also turned around."""
    mean, std, zoom, threshold, *smear, keep = c
    h, w = x.shape[-2:]
    crop = (1, math.ceil(h / zoom), math.ceil(w / zoom))
    flakes = enlarge(draw(gens, crop, "normal_", mean, std, near=x), zoom, h, w)
    flakes = truncate(flakes * (flakes >= threshold) * 255)  # 8 bits before the smear too
    flakes = motion_blur(flakes, smear, gens, -135, -45).float()
    y = x.float()
    white = torch.maximum(y, v2.functional.rgb_to_grayscale(y) * 1.5 + 127.5)
    return truncate(torch.lerp(white, y, keep) + flakes + flakes.flip(-2, -1))


def plasma(gens, size, decay, near=None):
    """Diamond-square heights on [0,1], (B,size,size) of a torus of the next power of two."""
    u = draw(gens, (1 << (size - 1).bit_length(),) * 2, "uniform_", -1, 1, near=near)
    m, step, amplitude = torch.zeros_like(u), u.shape[1] // 2, 1.0
    while step:
        grid, noise = m[:, ::step, ::step], u[:, ::step, ::step] * amplitude
        a = grid[:, ::2, ::2]  # known; b: in the middle of four a; then those between two of each
        right, below = a.roll(-1, 2), a.roll(-1, 1)
        b = (a + right + below + right.roll(-1, 1)) / 4 + noise[:, 1::2, 1::2]
        grid[:, 1::2, 1::2] = b
        grid[:, ::2, 1::2] = (a + right + b.roll(1, 1) + b) / 4 + noise[:, ::2, 1::2]
        grid[:, 1::2, ::2] = (b.roll(1, 2) + b + a + below) / 4 + noise[:, 1::2, ::2]
        step, amplitude = step // 2, amplitude / decay ** 2  # the reference: wibble times wibble
    m -= m.amin((1, 2), keepdim=True)
    return m.div_(m.amax((1, 2), keepdim=True))[:, :size, :size]


ICE = ((.305, .585, .650, .07), (.787, .805, .841, .08), (.787, .805, .841, .08),
       (.540, .599, .648, .10), (.441, .484, .528, .14))  # mean RGB, deviation within 224 px


def frost_folder():
    """The folder of the original textures in the package imagecorruptions, or None."""
    package = importlib.util.find_spec("imagecorruptions")  # no import: it wants old NumPy
    return package and Path(package.origin).parent / "frost"


@functools.lru_cache(maxsize=64)
def ice(i, h, w, device):
    """Texture i, uint8 (3,H,W), or tinted plasma where its file is not to be had; reduced to
    a fifth for small images, less where that would hardly cover one."""
    if folder := frost_folder():
        y = v2.functional.pil_to_tensor(read_picture(next(folder.glob(f"frost{i + 1}.*"))))
    else:
        *tint, deviation = ICE[i]
        y = plasma([rng("ice", i)], 256, 1.04).repeat(1, 2, 2)
        y = (y - y.mean()) * (deviation / y.std()) + torch.tensor(tint).view(3, 1, 1)
        y = truncate(y * 255)
    least = 1.1 * max(h / y.shape[1], w / y.shape[2])
    scale = max(least, 0.2 if max(h, w) <= SMALL_PX else 1)
    size = [round(n * scale) for n in y.shape[1:]]
    return v2.functional.resize(y, size, antialias=False).to(device)


def frost(x, c, gens):
    """c0 * image + c1 * a random crop of one of five pictures of ice."""
    (h, w), crops = x.shape[-2:], []
    for which, u, v in draw(gens, (3,), "uniform_").tolist():
        y = ice(int(which * 5), h, w, x.device)
        top, left = int(u * (y.shape[1] - h)), int(v * (y.shape[2] - w))
        crops.append(y[:, top:top + h, left:left + w])
    return truncate(x.float().mul_(c[0]).add_(torch.stack(crops), alpha=c[1]))


def fog(x, c, gens):
    """Image + c0 * plasma, scaled back by the image's own maximum."""
    h, w = x.shape[-2:]
    peak = x.amax((1, 2, 3)).float()[:, None, None, None]
    y = plasma(gens, max(h, w), c[1], x)[:, None, :h, :w]
    return truncate((y * (255 * c[0]) + x).mul_(peak / (peak + 255 * c[0])))


def brightness(x, c, gens):
    """V + c in HSV: at fixed hue and saturation channels scale with V; black turns grey."""
    y = x.float()
    v = y.amax(1, keepdim=True)
    new = (v + 255 * c).clamp_(max=255)
    return truncate(torch.where(v == 0, new, y.mul_(new / v)))


def contrast(x, c, gens):
    """Distance to each channel's own mean, times c."""
    y, dtype = x.float(), None if on_cpu(x) else torch.float64  # exact, however it is summed
    return truncate(torch.lerp(y.mean((2, 3), True, dtype=dtype).float(), y, c))


def remap(x, points, corners):
    """Bilinear x (B,C,H,W) at points (B,2,H,W), columns and rows in pixels, mirrored about
    the centre of the edge pixel (corners) or about its outer edge."""
    size = on(points, x.shape[:1:-1], points.dtype)
    scale, start = (2 / (size - 1), -1) if corners else (2 / size, 1 / size - 1)
    grid = points.permute(0, 2, 3, 1) * scale + start
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=corners)


def elastic_transform(x, c, gens):
    """A random affine map (mirrored at the edge pixel), then a smooth random field (mirrored
    at the edge); c = amplitude, sigma and jitter in shares of the side."""
    h, w = x.shape[-2:]
    side = min(h, w) * (1 if max(h, w) <= SMALL_PX else 244 / 224)  # the reference's slip
    amplitude, sigma, jitter = (side * k for k in c)
    # from output to input pixels: the map that moves three points; the reference has h with x
    s, signs = min(h, w) // 3, ((1, 1), (1, -1), (-1, -1))
    points = torch.tensor([[h // 2 + i * s, w // 2 + j * s, 1] for i, j in signs]).double()
    shift = draw(gens, (3, 2), "uniform_", -jitter, jitter).double()
    moved = points + F.pad(shift, (0, 1))
    affine = torch.linalg.solve(moved, points.expand_as(moved)).mT[:, :2].float()
    a, b, offset = on(x, affine)[..., None, None].unbind(2)  # (B,2,1,1) each
    here = on(x, np.indices((h, w))).flip(0)  # columns and rows
    y = remap(x.float(), a * here[0] + b * here[1] + offset, True)
    field = draw(gens, (2, h, w), "uniform_", -amplitude, amplitude, near=x)
    return truncate(remap(y, here + gaussian(field, sigma, 3, "symmetric"), False))


def by_pillow(x, edit):
    """uint8 (B,3,H,W): x with `edit` done to each image as a Pillow image."""
    done = bytearray()
    for planes in x.cpu().numpy():  # plane by plane: cheaper than to permute axes
        image = edit(Image.merge("RGB", [Image.fromarray(plane) for plane in planes]))
        for band in "RGB":
            done += image.tobytes("raw", band)
    return torch.frombuffer(done, dtype=torch.uint8).view(len(x), 3, image.height, image.width)


def pixelate(x, c, gens):
    """Pillow's box reduction to a share c of the side, and its box enlargement."""
    h, w = x.shape[-2:]
    m, n = int(h * c), int(w * c)
    few = by_pillow(x, lambda image: image.resize((n, m), Image.BOX)).numpy()
    rows, columns = (((np.arange(a) + 0.5) * (b / a)).astype(int) for a, b in ((h, m), (w, n)))
    return torch.from_numpy(few.take(columns, 3).take(rows, 2)).to(x.device)


def jpeg_compression(x, c, gens):
    """JPEG at quality c, chroma 4:2:0, by Pillow."""
    def edit(image):
        image.save(file := io.BytesIO(), "JPEG", quality=c)
        return Image.open(file)
    return by_pillow(x, edit).to(x.device)


RECIPES = {  # name: function; c of severities 1 to 5 in make_imagenet_c.py; in make_cifar_c.py
    "gaussian_noise": (gaussian_noise, (.08, .12, .18, .26, .38), (.04, .06, .08, .09, .1)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (.03, .06, .09, .17, .27), (.01, .02, .03, .05, .07)),
    "defocus_blur": (defocus_blur, ((3, .1), (4, .5), (6, .5), (8, .5), (10, .5)),
                     ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1))),
    "glass_blur": (glass_blur, ((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
                   ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2))),
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
                    ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, ((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03)),
                  ((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01))),
    "snow": (snow, ((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7),
                    (.55, .3, 4, .9, 12, 8, .7), (.55, .3, 4.5, .85, 12, 8, .65),
                    (.55, .3, 2.5, .85, 12, 12, .55)),
             ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9),
              (.15, .3, 1.75, .55, 10, 4, .9), (.25, .3, 2.25, .6, 12, 6, .85),
              (.3, .3, 1.25, .65, 14, 12, .8))),
    "frost": (frost, ((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75)),
              ((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45))),
    "fog": (fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
            ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (.1, .2, .3, .4, .5), (.05, .1, .15, .2, .3)),
    "contrast": (contrast, (.4, .3, .2, .1, .05), (.75, .5, .4, .3, .15)),
    "elastic_transform": (elastic_transform, ((2, .7, .1), (2, .08, .2), (.05, .01, .02),
                                              (.07, .01, .02), (.12, .01, .02)),
                          ((0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05),
                           (.1, .03, .03))),
    "pixelate": (pixelate, (.6, .5, .4, .3, .25), (.95, .9, .85, .75, .65)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
}
CORRUPTIONS = tuple(RECIPES)
CELLS = [(name, severity) for name in CORRUPTIONS for severity in range(1, 6)]


def corrupt(x, name, severity, seed=0, index=None, jpeg=False):
    """x corrupted, uint8 (B,3,H,W) on x's device, with sides of 32 to 512 px: a function of
    (x, index, seed, name, severity); a GPU has other noise.  pixelate and JPEG are Pillow's.

    index: B ints, the identities of the images, by default 0..B-1. jpeg: the round trip at
    quality 85 that the published files went through.
    Paper: Hendrycks and Dietterich, ICLR 2019. Raises: UserError for any other input."""
    function, *columns = choose(RECIPES, str(name), "corruption")
    sides, came = x.shape[2:], f"{x.dtype} {tuple(x.shape)}"
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3 or not (
            32 <= min(sides) and max(sides) <= 512):
        raise UserError(f"expected torch.uint8 (B,3,H,W), sides of 32 to 512 px, got {came}")
    if severity not in (1, 2, 3, 4, 5):
        raise UserError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}")
    index = range(len(x)) if index is None else [int(k) for k in index]
    if len(index) != len(x):
        raise UserError(f"{len(x)} images but {len(index)} indices")
    severity, out = int(severity), torch.empty_like(x)
    c = columns[max(sides) <= SMALL_PX][severity - 1]
    for s in slices(x, 2 ** 19):
        gens = [rng("corrupt", int(seed), k, name, severity) for k in index[s]]
        y = function(x[s].contiguous(), c, gens)
        out[s] = jpeg_compression(y, 85, gens) if jpeg else y
    return out


# ==== 4. AUGMENTATIONS ====
# In: uint8 (B,3,H,W) on any device, a generator. Out: the same, drawn anew by image.
# Always: a function of (x, generator state); the global generator stays as it was.


def _bytes(x):
    """uint8: x in 0..255, rounded and clipped."""
    return truncate(x + 0.5)


def rotate(x, level):
    """x turned by int(3 level) degrees about its centre: bilinear, 0 outside."""
    h, w = x.shape[2:]
    turn = on(x, np.deg2rad((level * 3).astype(int)), torch.float32)
    cos, sin = 2 * turn.cos(), 2 * turn.sin()
    v, u = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    u, v = u + 0.5 - w / 2, v + 0.5 - h / 2
    grid = torch.cat([cos * u / w - sin * v / w, sin * u / h + cos * v / h], 1)  # (N,2,H,W)
    return truncate(F.grid_sample(x.float(), grid.permute(0, 2, 3, 1), align_corners=False))


def shear(x, level):
    """x with row r moved left by 0.03 level (r + 1/2) columns: bilinear, 0 outside."""
    c, h, w = x.shape[1:]
    shift = (0.03 * level * (np.arange(h) + 0.5)).clip(-w, w).repeat(c, 1).ravel()  # (N 3 H,)
    left = np.floor(shift).astype(int)
    p = np.abs(left).max() + 1
    start = on(x, left + p + np.arange(len(left)) * (w + 2 * p))
    rows = F.pad(x, (p, p)).flatten().unfold(0, w + 1, 1).index_select(0, start).float()
    share = on(x, shift - left, torch.float32)[:, None]
    return truncate(torch.lerp(rows[:, :-1], rows[:, 1:], share)).view(x.shape)


def translate(x, level, axis):
    """x moved left (axis 3) or up (2) by int(level / 30 of the side): 0 outside."""
    steps = (level * x.shape[axis] / 30).astype(int).ravel()
    p = np.abs(steps).max()
    wide = F.pad(x, (0, 0) * (3 - axis) + (p, p))
    return torch.stack([i.narrow(axis - 1, p + k, x.shape[axis]) for i, k in zip(wide, steps)])


OPS = {  # of AugMix: within a grey level of PIL's, but for the borders of what moves;
    # of x and level, NumPy (N,1,1,1), of the first five negative for the other way
    "rotate": rotate,
    "shear_x": shear,
    "shear_y": lambda x, level: shear(x.mT, level).mT.contiguous(),
    "translate_x": lambda x, level: translate(x, level, 3),
    "translate_y": lambda x, level: translate(x, level, 2),
    "autocontrast": lambda x, level: v2.functional.autocontrast(x),
    "equalize": lambda x, level: v2.functional.equalize(x),
    "posterize": lambda x, level: x & on(x, 256 - (16 << (level * 4 / 10).astype(int)), x.dtype),
    "solarize": lambda x, level:
        x ^ (x > on(x, 255 - (level * 256 / 10).astype(int))).to(torch.uint8) * 255,
}  # without brightness, contrast, colour and sharpness: ImageNet-C has them


def _draw_ops(random, severity, *shape):
    """Places in OPS and levels, NumPy of a shape; half of the first five's are negative."""
    op = random.integers(len(OPS), size=shape)
    level = random.uniform(0.1, severity, shape)
    negative = (op < 5) & (random.random(shape) < 0.5)
    return op, np.where(negative, -level, level)


def _do_ops(images, op, level):
    """A list: images with operation op[i] at level[i] done to image i; -1 is none."""
    images, level = list(images), level.reshape(-1, 1, 1, 1)
    for k, operation in enumerate(OPS.values()):
        at = np.flatnonzero(op == k).tolist()
        done = operation(torch.stack([images[i] for i in at]), level[at]) if at else ()
        for i, image in zip(at, done):
            images[i] = image
    return images


def augmix(x, generator, severity=1, width=3, depth=(1, 3), alpha=1.0):
    """x mixed with `width` chains of depth[0] to depth[1] random operations each.
    Paper: AugMix (Hendrycks et al. 2020): severity 1 (ImageNet), 3 (CIFAR).  Differs: uint8."""
    random, n, (low, high) = np.random.default_rng(_key(generator)), len(x), depth
    # METHOD AugMix: (1 - m) x + m sum_k w_k chain_k(x), w ~ Dirichlet(a), m ~ Beta(a, a)
    w, m = random.dirichlet([alpha] * width, n), random.beta(alpha, alpha, (n, 1))
    weights = np.concatenate([1 - m, m * w], 1)
    steps = random.integers(low, high + 1, (n, width, 1))
    op, level = _draw_ops(random, severity, n, width, high)
    op = np.where(np.arange(high) < steps, op, -1)
    out = torch.empty_like(x)
    for s in slices(x, 2 ** 20):
        views = [image for image in x[s] for _ in range(width)]
        for t in range(high):
            views = _do_ops(views, op[s, :, t].ravel(), level[s, :, t].ravel())
        share = on(x, weights[s], torch.float32)[..., None, None, None]
        for i in slices(x[s], 2 ** 18):  # on a CPU an image at a time, in its cache
            mixed = x[s][i] * share[i, 0]
            for k in range(width):
                mixed += torch.stack(views[k::width][i]) * share[i, k + 1]
            out[s][i] = _bytes(mixed)
    return out


def jsd(logits_clean, logits_aug1, logits_aug2):
    """Scalar float32: Jensen-Shannon consistency of three views, logits (B,C).
    Paper: AugMix, with weight 12 and cross-entropy on the clean view only."""
    p = [z.float().softmax(1) for z in (logits_clean, logits_aug1, logits_aug2)]
    log_mean = (sum(p) / 3).clamp(1e-7, 1).log()  # the paper's clamp
    return sum(F.kl_div(log_mean, q, reduction="batchmean") for q in p) / 3


@functools.lru_cache(maxsize=4)
def load_pictures(folder, size, limit=2000):
    """uint8 (M,3,size,size) for pixmix: the first `limit` pictures below a folder, cropped;
    without a folder 48 clouds of plasma, a field a channel."""
    if not folder:
        fields = plasma([rng("clouds", i) for i in range(3 * 48)], size, 1.3)
        return _bytes(255 * fields.unflatten(0, (48, 3)))
    if not (paths := pictures_below(Path(folder))[:limit]):
        raise UserError(f"pixmix: no picture in {folder}; give a folder of .jpg or .png files")
    fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    return torch.stack([fit(read_picture(p)) for p in paths])


def _blend(x, y, a, b, multiply):
    """x and y in [0, 1] added (a x + b y about grey) or multiplied (x^a y^b), then clipped."""
    a, b = (on(x, v, x.dtype).view(-1, 1, 1, 1) for v in (a, b))
    mixed, m = x * a + y * b + (1 - a - b) / 2, on(x, np.flatnonzero(multiply))
    mixed[m] = (2 * x[m]) ** a[m] * (2 * y[m]).clamp(min=1e-37) ** b[m] / 2
    return mixed.clamp(0, 1)


def pixmix(x, generator, severity=1, k=4, beta=3, pictures=None):
    """x mixed 0 to k times with a picture or with an augmented copy of itself.
    pictures: a folder, or None for clouds made here.
    Paper: PixMix (Hendrycks et al. 2022): beta 3 for CIFAR, 4 in its ImageNet code."""
    random, (n, _, h, w) = np.random.default_rng(_key(generator)), x.shape
    size = max(h, w) * 8 // 7
    pool = load_pictures(pictures, size)
    crop = random.integers([[len(pool)], [size - h + 1], [size - w + 1]], size=(3, n))
    pictures = on(x, torch.stack([pool[i, :, r:r + h, c:c + w] for i, r, c in crop.T]))
    op, level = _draw_ops(random, severity, k + 1, n)
    own, multiply, inner = random.random((3, k + 1, n)) < 0.5
    op, rounds = np.where(own, op, -1), random.integers(k + 1, size=n)
    a, small, b = (random.beta(*ab, (k + 1, n)) for ab in ((beta, 1), (1, beta), (1, beta)))
    a, b = np.where(inner, a, 1 + small), np.where(inner, b, -b)
    mixed = torch.stack(_do_ops(x, op[0], level[0])) / 255
    for j in range(1, rounds.max() + 1):
        at = np.flatnonzero(rounds >= j)
        others, to = [x[i] if own[j, i] else pictures[i] for i in at], on(x, at)
        others = torch.stack(_do_ops(others, op[j, at], level[j, at])) / 255
        mixed[to] = _blend(mixed[to], others, a[j, at], b[j, at], multiply[j, at])
    return _bytes(mixed * 255)


def deepaugment(x, generator, strength=(0.375, 0.75), hidden=16):
    """x through a residual network whose random weights are drawn anew for each image.
    strength: range of the residual's weight; (0.1, 0.3) suits 32 px: detail drowns sooner.
    Paper: Noise2Net, the on-the-fly relative of DeepAugment (Hendrycks et al. 2021).
    Differs: kernels' sides (1 or 3 px) and dilations are of a batch, strengths of an image."""
    random = np.random.default_rng(_key(generator))

    def draw(low, high, *shape):
        return on(x, random.uniform(low, high, (len(x), *shape)), torch.float32)

    def conv(z, kernels, dilation=1):
        """Instance norm (of groups: 3 times as fast) of images under kernels of their own."""
        z = F.conv2d(z.reshape(1, -1, *z.shape[2:]), kernels.flatten(0, 1), padding="same",
                     dilation=dilation, groups=len(z))
        return F.group_norm(z, z.shape[1]).view(len(kernels), -1, *z.shape[2:])

    strength = draw(*strength, 1, 1, 1)
    pixels = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)  # ImageNet's mean and deviation
    mean, std = (on(x, v, torch.float32).view(3, 1, 1) for v in pixels)
    z = (x - mean) / std
    for block in random.integers([2, 3], size=(4, 3, 2)).tolist():
        kernels = [draw(-1, 1, hidden, hidden, 1 + 2 * k, 1 + 2 * k) for k, _ in block]
        wide, narrow = draw(-1, 1, 4 * hidden, 3, 1, 1), draw(-1, 1, 3, 4 * hidden, 1, 1)
        for s in slices(x, 2 ** 18):
            parts = [0, *conv(z[s], wide[s]).relu_().chunk(4, 1)]
            for i, (kernel, (_, d)) in enumerate(zip(kernels, block), 1):
                parts[i] = conv(parts[i] + parts[i - 1], kernel[s], 1 + d).relu_()
            z[s] += strength[s] * conv(torch.cat(parts[1:], 1), narrow[s])
    return _bytes(z * std + mean)


def image_by_image(transform):
    """An augmentation by a transform of torchvision, which takes a batch for one image."""
    def augmentation(x, generator):
        with seeded(_key(generator)):
            return torch.stack([transform(image) for image in x])
    return augmentation


AUGMENTATIONS = {  # in the order in which a sum applies them
    "none": lambda x, generator: x,
    "deepaugment": deepaugment,
    "pixmix": pixmix,
    "augmix": augmix,
    "randaugment": image_by_image(v2.RandAugment(2, 9)),
    "cutout": image_by_image(v2.RandomErasing(1, (0.25, 0.25), (1, 1), 128)),  # half of each side
    "erasing": image_by_image(v2.RandomErasing(0.25, value=128)),  # Zhong et al. 2020
}
LABEL_MIXERS = {"mixup": functools.partial(v2.MixUp, alpha=0.8),  # alpha as in [B]
                "cutmix": functools.partial(v2.CutMix, alpha=1.0)}


def spec_names(spec, options=()):
    """The set of names in spec. Raises: UserError for one unknown or there twice."""
    names, known = spec.split("+"), [*AUGMENTATIONS, *LABEL_MIXERS]
    for name in [*names, *options]:
        if name not in known or names.count(name) > 1:
            raise UserError(f"augmentation {name!r} in {spec!r}: each once, of {known}")
    return set(names)


def augment(x, spec, generator, **options):
    """uint8 like x: the augmentations of spec ("a" or "a+b") in the order of AUGMENTATIONS.
    A sum is a sequence: "deepaugment+augmix", in either order, is AugMix on DeepAugment.
    mixup and cutmix are left to mix_labels.
    options: {name: its keywords}, as augment(x, "augmix", g, augmix={"severity": 3})."""
    names = spec_names(spec, options)
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
        raise UserError(f"augment: expected uint8 (B,3,H,W), got {x.dtype} {tuple(x.shape)}")
    for name, function in AUGMENTATIONS.items():
        if name in names and len(x):
            x = function(x, generator, **options.get(name, {}))
    return x


def mix_labels(x, y, spec, generator, n_classes):
    """(x, soft labels (B,n_classes)): images mixed with their neighbours by mixup or cutmix.
    spec as in augment; with both the batch draws one, with neither all stays as it is."""
    if not (names := sorted(spec_names(spec) & set(LABEL_MIXERS))):
        return x, y
    with seeded(key := _key(generator)):
        mixer = LABEL_MIXERS[names[key % len(names)]](num_classes=n_classes)
        x, soft = mixer(x.float(), y)
    return _bytes(x), soft


# ==== 5. DATA ====
# In: a set's name.  Out: ImageSet, and batches x uint8 (B,3,H,W), y (B,), index (B,).
# Always: a sample is a function of (seed, epoch, index), the order of (seed, epoch).


RANDOM_CROP = v2.RandomResizedCrop(1)  # draws the place alone: to call it costs 17 % more


@dataclass(frozen=True)
class View:
    """How a picture becomes a square image to score: border_px cut off (ObjectNet's frame), the
    short side resized to size_px / crop_pct, the centre cut out; squash = both sides resized."""
    size_px: int = 224
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    squash: bool = False
    border_px: int = 0

    def __str__(self) -> str:
        border = f"cut {self.border_px} px, " if self.border_px else ""
        cut = "squashed" if self.squash else f"crop {self.crop_pct:g}"
        return f"{border}{self.size_px} px, {cut}, {self.interpolation}"

    def __call__(self, im: Image.Image | Tensor) -> Image.Image | Tensor:
        if self.border_px:
            im = ImageOps.crop(im, self.border_px)
        size = [self.size_px] * 2 if self.squash else [math.floor(self.size_px / self.crop_pct)]
        im = v2.functional.resize(im, size, interpolation=v2.InterpolationMode(self.interpolation))
        return v2.functional.center_crop(im, self.size_px)


@dataclass(eq=False)
class ImageSet(torch.utils.data.Dataset):
    """Labelled square images, held in memory or read from files.

    base: the set's name; name: what the results call it.  y: labels (n,).
    images: uint8 (n,3,S,S), or the paths of picture files; `view` makes both square.
    outputs: the classes of a network that answers here by itself; ids (C,k): which of its outputs
    mean class k, None = all in order.  corrupted: of a -c set how, "read" or "made" on the fly.
    index: the images in use.  draw: (seed, crop, flip) of training.  beside: a copy of each image
    (samples of [B]), which comes as channels 3 to 5, cut alike."""
    base: str
    y: Sequence[int]
    classes: Sequence[str]
    view: View = View()
    images: Tensor | Sequence[str] = ()
    name: str = ""
    outputs: tuple[str, ...] = ()
    ids: Tensor | None = None
    corrupted: str = ""
    index: np.ndarray | None = None
    beside: ImageSet | None = None
    draw: tuple[int, bool, bool] = (0, False, False)

    def __post_init__(self):
        self.y, self.classes = np.asarray(self.y, np.int64), tuple(self.classes)
        self.name, self.outputs = self.name or self.base, self.outputs or self.classes
        self.index = np.arange(len(self.y)) if self.index is None else self.index

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, n: int, *cell) -> ImageSet:
        """The same set with at most n images (0 = all), drawn by a fixed seed, for each cell."""
        if not 0 < n < len(self):
            return self
        order = np.random.default_rng(fold("subset", self.base, *cell)).permutation(len(self.y))
        return dataclasses.replace(self, index=np.sort(order[np.isin(order, self.index)][:n]))

    def training(self, seed: int, crop: bool = True, flip: bool = True) -> ImageSet:
        """The same set with random crops and flips, functions of (seed, epoch, index)."""
        return dataclasses.replace(self, draw=(seed, crop, flip))

    def __getitems__(self, keys: Sequence[tuple[int, int]]):
        """Batch (x uint8 (B,3,H,W), y (B,), index (B,)) for keys (epoch, position) of an epoch."""
        epoch, index = keys[0][0], self.index[[p for _, p in keys]]
        seed, crop, flip = self.draw
        if not isinstance(self.images, Tensor):
            x = torch.stack([self._read(epoch, int(i)) for i in index])
        else:
            x = self.view(self.images[torch.from_numpy(index)])
            if crop or flip:  # moved by up to 1/8 of the side, edges reflected; mirrored
                draws = np.random.default_rng(fold(seed, "crop", epoch))
                u = draws.random((len(self.y), 3), dtype=np.float32)[index]
                s, pad = x.shape[-1], x.shape[-1] // 8 if crop else 0
                row, col = torch.from_numpy((u[:, :2] * (2 * pad + 1)).astype(np.int64)).T
                x = v2.functional.pad(x, pad, padding_mode="reflect")
                x = x.unfold(2, s, 1).unfold(3, s, 1)[torch.arange(len(x)), :, row, col]
                mirrored = torch.from_numpy(flip & (u[:, 2] >= 0.5))[:, None, None, None]
                x = torch.where(mirrored, x.flip(3), x)
        if self.beside is not None:
            other = dataclasses.replace(self.beside, index=self.index, draw=self.draw)
            x = torch.cat([x, other.__getitems__(keys)[0]], 1)
        return x, torch.from_numpy(self.y[index]), torch.from_numpy(index)

    def _read(self, epoch: int, i: int) -> Tensor:
        (seed, crop, flip), path, view = self.draw, self.images[i], self.view
        with seeded(seed, "crop", epoch, i):
            if crop:
                x = decode(path)
                top, left, h, w = RANDOM_CROP.make_params([x]).values()
                x = F.interpolate(x[None, :, top:top + h, left:left + w], [view.size_px] * 2,
                                  mode=view.interpolation, antialias=True)[0]
            else:
                x = v2.functional.pil_to_tensor(view(read_picture(path)))
            return x.flip(2) if flip and torch.rand(1) < 0.5 else x


def as_images(images) -> ImageSet:
    """An ImageSet of: itself; (x, y); a DataLoader of such batches; or any sized data set of
    (image, label), read into memory; uint8 (3,S,S), or float in [0, 1].  Raises: UserError."""
    if isinstance(images, ImageSet):
        return images
    if not isinstance(images, (tuple, torch.utils.data.DataLoader)):
        images = torch.utils.data.DataLoader(images, 256)
    x, y = images if isinstance(images, tuple) else map(torch.cat, zip(*images))
    if x.is_floating_point() and x.numel() and 0 <= x.min() and x.max() <= 1:
        x = (x * 255).round().to(torch.uint8)
    shape = tuple(x.shape)
    if x.dtype != torch.uint8 or shape != (len(y), 3, *shape[-1:] * 2) or not len(y):
        raise UserError(f"images: expected uint8 (n,3,S,S), or floats in [0, 1], and n labels, got "
                        f"{x.dtype} {shape} and {len(y)}")
    classes = [str(k) for k in range(int(max(y)) + 1)]
    return ImageSet("images", y, classes, View(x.shape[-1], 1.0), images=x)


def batches(n: int, batch: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """Endless lists of (epoch, position), this process's of each batch.  Raises: UserError."""
    rank, size = world()
    if n < batch:
        raise UserError(f"{n} training images are fewer than a batch of {batch}")
    share = slice(rank * batch // size, (rank + 1) * batch // size)
    for epoch in itertools.count():
        order = np.random.default_rng(fold(seed, "order", epoch)).permutation(n)
        for picks in order[:n // batch * batch].reshape(-1, batch)[:, share]:
            yield [(epoch, i) for i in picks.tolist()]


def _kill_workers() -> None:
    """Ends workers whose iterator is still held, by a traceback for example: at exit Python would
    wait for ever for the effect of a SIGTERM, which they block."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)        # torch's handler reports it as a crash
    for process in torch.multiprocessing.active_children():
        if process.daemon:
            process.kill()


def loader(images: ImageSet, workers: int, **options) -> torch.utils.data.DataLoader:
    """DataLoader whose workers leave Ctrl-C and SIGTERM to this process, which stops when it is
    ready, and end with it, however it ends; the number of workers changes no sample."""
    workers = 0 if isinstance(images.images, Tensor) else workers
    if workers:
        atexit.register(_kill_workers)                   # runs before multiprocessing's own
    return torch.utils.data.DataLoader(
        images, num_workers=workers, multiprocessing_context="fork" if workers else None,
        worker_init_fn=lambda _: signal.pthread_sigmask(signal.SIG_BLOCK, Progress.signals),
        collate_fn=lambda batch: batch, pin_memory=torch.cuda.is_available(), **options)


# ---- shapes: a procedural set --------------------------------------------------------------------

def _star(x: Tensor, y: Tensor, n: int, tip: float, dent: float) -> Tensor:
    """Signed field of a star: n tips at the one radius, n dents at the other."""
    step, r = math.pi / n, torch.hypot(x, y)
    a = (torch.remainder(torch.atan2(x, y), 2 * step) - step).abs()     # folded: 0 dent, step tip
    along, across = tip * math.cos(step) - dent, tip * math.sin(step)   # from the dent to the tip
    return ((r * a.cos() - dent) * across - r * a.sin() * along) / math.hypot(along, across)


# Signed fields, negative inside, on coordinates of about -1..1, y up.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.75,
    "triangle": lambda x, y: _star(x, y, 3, 0.95, 0.475),
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.66,
    "pentagon": lambda x, y: _star(x, y, 5, 0.9, 0.73),
    "hexagon": lambda x, y: _star(x, y, 6, 0.9, 0.78),
    "star": lambda x, y: _star(x, y, 5, 1.0, 0.4),
    "cross": lambda x, y: torch.maximum(torch.maximum(x.abs(), y.abs()) - 0.85,
                                        torch.minimum(x.abs(), y.abs()) - 0.24),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.62).abs() - 0.17,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.85,
                                           0.7 - torch.hypot(x - 0.45, y)),
    "heart": lambda x, y: torch.minimum((x.abs() + y.abs() - 0.64) / 2 ** 0.5,
                                        torch.hypot(x.abs() - 0.32, y - 0.32) - 0.32 * 2 ** 0.5),
}


def _render_shapes(u: Tensor, field: Callable, size: int, style: str) -> Tensor:
    """uint8 images (B,3,size,size) of one shape from u (B,11,1,1) in 0..1: solids, bright to faint,
    on a nearly black ground; style "r": drawings, outlines and hatching."""
    g = (torch.arange(size) + 0.5) / size * 2 - 1
    gy, gx = torch.meshgrid(-g, g, indexing="ij")
    turn, scale = u[:, 0] - 0.5, 0.4 + 0.25 * u[:, 1]
    dx, dy = gx - 0.5 * (u[:, 2] - 0.5), gy - 0.5 * (u[:, 3] - 0.5)
    x, y = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
    d = scale * field(x / scale, y / scale / (0.85 + 0.3 * u[:, 4]))
    cover = lambda d: (0.5 - d * size / 2).clamp(0, 1)   # the share of a pixel inside
    hues = u[:, 5:7, None] + torch.arange(3)[:, None, None] / 3   # (B,2,3,1,1)
    colour, ground = (0.5 + 0.5 * torch.cos(2 * math.pi * hues)).unbind(1)
    colour, ground = 0.3 + 0.7 * colour, (0.5 + 0.5 * ground) * u[:, 9:10]
    if style == "r":
        hatch = torch.sin((gx + gy) * (18 + 10 * u[:, 7])) < 2.4 * u[:, 8] - 1.2
        mask = torch.maximum(cover(d.abs() - 0.05), cover(d) * hatch)
        ground, ink = 0.12 * ground, 0.2 + 0.5 * colour
    else:
        light = 0.8 + 0.3 * (gx * (u[:, 7] - 0.5) + gy * (u[:, 8] - 0.5))
        mask, ground, ink = cover(d) * light, 0.06 * ground, colour * 0.35 ** u[:, 10:11]
    return (255 * torch.lerp(ground, ink, mask[:, None]) + 0.5).to(torch.uint8)


def make_shapes(n: int, size: int, split: str, style: str = "") -> tuple[Tensor, np.ndarray]:
    """(x uint8 (n,3,size,size), y (n,)): image i is a function of (split, style, i) alone."""
    u = np.random.default_rng(fold("shapes", split, style)).random((n, 11, 1, 1), np.float32)
    x, y = torch.empty(n, 3, size, size, dtype=torch.uint8), np.arange(n) % len(SHAPES)
    for k, field in enumerate(SHAPES.values()):
        for at in torch.arange(n)[k::len(SHAPES)].split(64):   # fits the CPU's cache
            x[at] = _render_shapes(torch.from_numpy(u)[at], field, size, style)
    return x, y


# ---- sets from disk: a reader gives paths (or images), labels and class names --------------------

# ObjectNet's 113 folders that are ImageNet classes too, and these classes' outputs (125).  Source:
# objectnet_to_imagenet_1k.json of objectnet-1.0/mappings.
OBJECTNET: dict[str, list[int]] = {item.split()[0]: list(map(int, item.split()[1:])) for item in """
    alarm_clock 409 530, backpack 414, banana 954, band_aid 419, basket 790, beer_bottle 440,
    bench 703, bicycle 444 671, binder_closed 446, bottle_cap 455, bread_loaf 930, broom 462,
    bucket 463, butchers_knife 499, can_opener 473, candle 470, cellphone 487, chair 423 559 765,
    clothes_hamper 588, coffee_french_press 550, combination_lock 507, computer_mouse 673,
    desk_lamp 846, doormat 539, dress 578, dress_shoe_men 630, drill 740, drinking_cup 968,
    drying_rack_for_dishes 729, envelope 549, fan 545, frying_pan 567, full_sized_towel 434,
    hair_dryer 589, hammer 587, hand_towel_or_rag 533, helmet 518 560, iron_for_clothes 606,
    jeans 608, keyboard 508, ladle 618, lampshade 619, laptop_open 620, lemon 951,
    letter_opener 623, lighter 626, lipstick 629, match 644, measuring_cup 647, microwave 651,
    mixing_salad_bowl 659, monitor 664, mug 504, nail_fastener 677, necklace 679, orange 950,
    padlock 695, paintbrush 696, paper_towel 700, pen 418 563 749, pill_bottle 720, pillow 721,
    pitcher 725, plastic_bag 728, plate 923, plunger 731, pop_can 737, portable_heater 811,
    printer 742, remote_control 761, ruler 769, running_shoe 770, safety_pin 772, salt_shaker 773,
    sandal 774, screw 783, shovel 792, skirt 601 655 689, sleeping_bag 797, soap_dispenser 804,
    sock 806, soup_bowl 809, spatula 813, speaker 632, still_camera 732 759, strainer 828,
    stuffed_animal 850, suit_jacket 834, sunglasses 837, sweater 841, swimming_trunks 842,
    t-shirt 610, teapot 849, tennis_racket 752, tie 457 906, toaster 859, toilet_paper_roll 999,
    trash_bin 412, tray 868, tv 851, umbrella 879, vacuum_cleaner 882, vase 883, wallet 893,
    watch 531, water_bottle 898, weight_exercise 543, weight_scale 778, wheel 479 694,
    whistle 902, wine_bottle 907, winter_glove 658, wok 909
""".split(",")}


@functools.cache
def synsets(part: str = "") -> tuple[str, ...]:
    """ImageNet's 1000 synsets in label order; part "a" or "r": the 200 of ImageNet-A or -R."""
    import timm
    file = f"data/_info/imagenet_{part + '_' if part else ''}synsets.txt"
    return tuple((Path(timm.__file__).parent / file).read_text().split())


def _tree(row: SetRow, top: Path, train: bool, data: Data):
    """TOP/CLASS/.../IMAGE; or TOP is a list, a line a picture, its path below row.pictures first,
    whose class is its folder (a/abbey/NAME.jpg), or without one the line's second word.
    For row.part the classes come with ImageNet's outputs that mean them.  A label comes from the
    name of the class, or the synset or number of its output; other folders are passed over."""
    if top.is_file():
        lines = [line.lstrip("/").split() for line in read_lines(top)]
        found = [(os.path.join(data.root, row.pictures, path),     # a/abbey/NAME.jpg: abbey
                  os.path.dirname(path)[2:] or "".join(rest[:1])) for path, *rest in lines]
    else:
        at = len(str(top)) + 1
        found = [(p, p[at:].split(os.sep)[0]) for p in pictures_below(top) if os.sep in p[at:]]
    if row.part is None:
        names = dict.fromkeys(sorted({c for _, c in found}), ())
    elif row.part == "objectnet":
        names = OBJECTNET
    else:
        names = {s: [synsets().index(s)] for s in synsets(row.part)}
    label = {}
    for k, (name, ids) in enumerate(names.items()):
        label |= dict.fromkeys([name, *map(str, ids), *(synsets()[i] for i in ids)], k)
    found = [(p, label[c]) for p, c in found if c in label]
    return [p for p, _ in found], [k for _, k in found], names


def _folder(row: SetRow, top: Path, train: bool, data: Data):
    """Any class-per-folder tree: TOP/train and TOP/val (or test), or, to score only, TOP itself."""
    test = next((top / s for s in ("val", "test") if (top / s).is_dir()), None)
    half = top / "train" if train else test or top
    paths, y, names = _tree(row, half, train, data)
    odd = {*names} ^ {folder.name for folder in (test or half).glob("[!.]*/")}
    if len(names) < 2 or odd or half == top and (top / "train").is_dir():
        raise UserError(f"{half}: expected two classes or more, found {len(names)}; without "
                        "pictures, or with training or test pictures alone: "
                        f"{', '.join(sorted(odd)[:9]) or 'none'}; training takes {top}/train/CLASS/"
                        f"IMAGE and {top}/val/CLASS/IMAGE, scoring any CLASS/IMAGE")
    return paths, y, names


def _torchvision_set(row: SetRow, top: Path, train: bool, data: Data):
    """By torchvision's own classes: Flowers102 (training = the official train and val, as in CLIP's
    linear probes), CIFAR, and MNIST and Fashion-MNIST, padded from 28 to 32 px."""
    sets = torchvision.datasets
    if row.name == "flowers102":
        splits = ("train", "val") if train else ("test",)
        parts = [sets.Flowers102(data.root, split) for split in splits]
        return (sum((part._image_files for part in parts), []),
                sum((part._labels for part in parts), []), sets.Flowers102.classes)
    raw = {"mnist": sets.MNIST, "fashion-mnist": sets.FashionMNIST, "cifar10": sets.CIFAR10,
           "cifar100": sets.CIFAR100}[row.name](data.root, train=train)
    x = torch.as_tensor(raw.data)
    grey = x.ndim == 3
    x = F.pad(x, (2,) * 4)[:, None].expand(-1, 3, -1, -1) if grey else x.permute(0, 3, 1, 2)
    return x, raw.targets, raw.classes


def _cell(row: SetRow, top: Path, train: bool, data: Data):
    """A cell of a published archive, TOP = ARCHIVE/corruption/severity: a tree, perhaps in a group
    of the tars; or of CIFAR's array of the corruption a fifth, the labels beside it."""
    archive, k, array = top.parents[1], int(top.name), top.parent.with_suffix(".npy")
    if array.is_file():
        x, y = np.load(array, mmap_mode="r"), np.load(archive / "labels.npy")
        part = slice((k - 1) * len(y) // 5, k * len(y) // 5)
        x = torch.tensor(x[part]).permute(0, 3, 1, 2).contiguous()
        return x, y[part], list(map(str, range(row.n_classes)))
    cell = top.relative_to(archive)
    for path in (top, *archive.glob(f"*/{cell}/")):
        if path.is_dir():
            return _tree(row, path, train, data)
    raise UserError(f"{archive} lacks the cell {cell}: unpack the rest, or move the folder away to "
                    f"have all made from {row.name}")


def _shapes(row: SetRow, top: Path, train: bool, data: Data):
    n, most = (20000, data.n_train) if train else (2000, data.n_test)
    x, y = make_shapes(min(n, most or n), data.size_px or 32, "train" if train else "test",
                       "r" if row.name == "shapes-r" else "")
    return x, y, SHAPES


@dataclass(frozen=True)
class SetRow:
    """A row of the table of sets: what it should hold, how to get it, where it lies below data.root
    (train: "" = where the test images are).  All sets are scored by top-1 over their own classes.

    read: (row, place, train, data) -> paths or images, labels, class names.
    pictures: where the paths of a list begin.  part: of ImageNet's outputs those that are scored;
    None = no such set.  view: its own, whatever the network's.  archive: its published -c copy."""
    name: str
    n_train: int | None           # published numbers of images, 0 = no such split, None = any
    n_test: int | None
    n_classes: int                # 0 = any
    get: str
    test: str = ""
    train: str = ""
    read: Callable = _tree
    pictures: str = ""
    part: str | None = None
    border_px: int = 0
    view: View | None = None
    archive: str = ""


_TV = "python -c \"import torchvision as t; t.datasets.{}('ROOT', download=True)\""
_VAL = "image-net.org (ILSVRC2012); torchvision.datasets.ImageNet sorts the archives into folders"
SETS: dict[str, SetRow] = {row.name: row for row in (
    SetRow("shapes", None, None, 10, "made here, no file", read=_shapes),
    SetRow("shapes-r", 0, None, 10, "made here, no file", read=_shapes),
    SetRow("fashion-mnist", 60000, 10000, 10, _TV.format("FashionMNIST"), "FashionMNIST/raw",
           read=_torchvision_set),
    SetRow("mnist", 60000, 10000, 10, _TV.format("MNIST"), "MNIST/raw", read=_torchvision_set),
    SetRow("cifar10", 50000, 10000, 10, _TV.format("CIFAR10") + "; -c: zenodo.org/record/2535967",
           "cifar-10-batches-py", read=_torchvision_set, archive="CIFAR-10-C"),
    SetRow("cifar100", 50000, 10000, 100, _TV.format("CIFAR100") + "; -c: zenodo.org/record/"
           "3555552", "cifar-100-python", read=_torchvision_set, archive="CIFAR-100-C"),
    SetRow("imagenet", 1281167, 50000, 1000, _VAL + "; -c: zenodo.org/record/2235448",
           "imagenet/val", "imagenet/train", part="", archive="imagenet-c"),
    SetRow("imagenet@a", 0, 10000, 200, _VAL, "imagenet/val", part="a"),
    SetRow("imagenet@r", 0, 10000, 200, _VAL, "imagenet/val", part="r"),
    SetRow("imagenet@objectnet", 0, 6250, 113, _VAL, "imagenet/val", part="objectnet"),
    SetRow("imagenet-v2", 0, 10000, 1000, "huggingface.co/datasets/vaishaal/ImageNetV2: "
           "matched-frequency", "imagenetv2-matched-frequency-format-val", part=""),
    SetRow("imagenet-a", 0, 7500, 200, "github.com/hendrycks/natural-adv-examples", "imagenet-a",
           part="a"),
    SetRow("imagenet-r", 0, 30000, 200, "github.com/hendrycks/imagenet-r", "imagenet-r", part="r"),
    SetRow("imagenet-sketch", 0, 50889, 1000, "github.com/HaohanWang/ImageNet-Sketch", "sketch",
           part=""),
    SetRow("objectnet", 0, 18574, 113, "objectnet.dev (its licence forbids to train on it)",
           "objectnet-1.0/images", part="objectnet", border_px=2),
    SetRow("tiny-imagenet", 100000, 10000, 200, "cs231n.stanford.edu/tiny-imagenet-200.zip; -c: "
           "zenodo.org/record/2536630", "tiny-imagenet-200/val/val_annotations.txt",
           "tiny-imagenet-200/train", pictures="tiny-imagenet-200/val/images",
           view=View(64, 1.0), archive="Tiny-ImageNet-C"),
    SetRow("flowers102", 2040, 6149, 102, _TV.format("Flowers102"), "flowers-102",
           read=_torchvision_set),
    SetRow("places205", 2448873, 20500, 205, "places.csail.mit.edu/downloadData.html: images "
           "(256 px) and trainvalsplit_places205, both in places205/",
           "places205/trainvalsplit_places205/val_places205.csv",
           "places205/trainvalsplit_places205/train_places205.csv",
           pictures="places205/data/vision/torralba/deeplearning/images256"),
    SetRow("inaturalist2021", 500000, 100000, 10000, "github.com/visipedia/inat_comp/tree/master/"
           "2021: train_mini.tar.gz and val.tar.gz as 2021_train_mini/ and 2021_valid/",
           "2021_valid", "2021_train_mini"),
    SetRow("sun397", 19850, 19850, 397, "vision.princeton.edu/projects/2010/SUN: SUN397.tar.gz, "
           "and in SUN397/ the lists of Partitions.zip", "SUN397/Testing_01.txt",
           "SUN397/Training_01.txt", pictures="SUN397"),
)}


def corrupted_name(name: str) -> str:
    """The name of a set's ImageNet-C-like copy."""
    return name.replace("folder:", "folder-c:", 1) if "folder:" in name else f"{name}-c"


def set_row(name: str) -> tuple[SetRow, bool]:
    """(row, whether its -c is meant) of NAME, NAME-c or [LABEL@]folder[-c]:PATH."""
    if folder := re.fullmatch(r"(?:([^@]+)@)?folder(-c)?:(.+)", name):
        label, c, path = folder.groups()
        row = SetRow(label or f"folder:{path}", None, None, 0, "", path, read=_folder)
        return row, bool(c)
    choose([*SETS, *map(corrupted_name, SETS)], name, "set")
    return SETS[name.removesuffix("-c")], name.endswith("-c")


def open_set(name: str, data: Data = Data(), split: str = "test", view: View = View(),
             cell: tuple[str, int] = CELLS[0]) -> ImageSet:
    """The named set.  view: the network's, for picture files; data.size_px and data.fit go before.

    A -c set is the published archive (this cell of it) where that is on disk, else the clean set,
    to be corrupted; ImageNet's pictures are then cut as the benchmark's were, whatever the view.
    What is regenerated, or a part of the published images, says so in its name.
    Raises: FileNotFoundError; UserError when it is unknown or incomplete."""
    (row, is_c), train = set_row(name), split == "train"
    if train and (is_c or row.n_train == 0):
        raise UserError(f"{name} has no training split: it is there to be scored")
    there = row.archive and Path(data.root, row.archive).is_dir()
    how = ("read" if there else "made") if is_c else ""
    if how == "read":
        row = dataclasses.replace(row, test=f"{row.archive}/{cell[0]}/{cell[1]}", read=_cell,
                                  view=row.view or View(224, 1.0))
    elif how and row.part is not None:
        row = dataclasses.replace(row, view=View(border_px=row.border_px))
    n, place = (row.n_train, row.train or row.test) if train else (row.n_test, row.test)
    top, get = Path("" if n is None else data.root, place), row.get.replace("ROOT", data.root)
    if n and how != "read" and not top.exists():
        raise FileNotFoundError(f"{row.name} is not there: looked for {top}; get it: {get}; "
                                "another place: data.root=FOLDER")
    try:
        found, y, classes = row.read(row, top, train, data)
    except (RuntimeError, ImportError, OSError, ValueError, EOFError) as e:  # of many libraries
        raise UserError(f"{row.name} in {top}: {e}; get it: {get}") from None
    odd, partial = row.n_classes not in (0, len(classes)), n and len(y) != n
    if odd or partial and not (len(y) and data.allow_partial):
        raise UserError(f"{row.name}: {len(y):,} images of {len(classes):,} classes in {top}, "
                        f"expected {n:,} of {row.n_classes:,}: unpack it again, or "
                        "data.allow_partial=true scores a part of the images of all classes")
    notes = ["regenerated"] if how == "made" and row.archive else []
    notes += [f"{len(y):,} of {n:,} images"] if partial else []
    name = corrupted_name(row.name) if is_c else row.name
    name += f" ({', '.join(notes)})" if notes else ""
    if isinstance(found, Tensor):
        view = View(data.size_px or found.shape[-1], 1.0)
    else:
        squash = data.fit == "squash" if data.fit else view.squash
        view = row.view or dataclasses.replace(
            view, size_px=data.size_px or view.size_px, squash=squash, border_px=row.border_px)
    outputs = synsets() if row.part is not None else ()
    ids = torch.tensor([(k * 3)[:3] for k in classes.values()]) if row.part else None   # 3 each
    images = ImageSet(row.name, y, classes, view, found, name, outputs, ids, how)
    return images.subset(data.n_train if train else data.n_test)


# ==== 6. MODELS ====
# In: a name or a module.  Out: a network from images (uint8 or [0, 1]) to logits, and the same
# network as a list of stages.  Always: stages(net)(x) equals net(x) to the last bit.


@dataclass(frozen=True)
class Card:
    """What a network knows of itself; it is saved beside its weights."""
    name: str = ""                   # what `build` makes it from
    n_classes: int = 0
    size_px: int = 0                 # side of the images that it sees, 0 = as they come
    view: View = View()              # how picture files become its pixels
    classes: tuple[str, ...] = ()    # names of its outputs, () = not known
    home: str = ""                   # the set that it was trained on
    prompts: tuple = ()              # (names, templates) of a zero-shot network
    clip: str = ""                   # file of its two towers; "" = by tag; "both towers" = this one
    fresh: bool = False              # its classifier is not trained
    made: dict = dataclasses.field(default_factory=dict)     # for `load`: {kind: its keywords}
    label: str = ""                  # its name in the tables
    key: dict = dataclasses.field(default_factory=dict)      # the settings that made it
    train: dict = dataclasses.field(default_factory=dict)    # {images, seconds, gflops}


class Net(nn.Module):
    """A network that takes images and normalises and resizes them for itself.
    net: any module from normalised images to logits.  mean, std: of images in [0, 1].
    Shapes: x (B,3,H,W), uint8 or in [0, 1] -> logits (B, n_classes)."""

    def __init__(self, net: nn.Module, card: Card = Card(), mean=(0.0,) * 3, std=(1.0,) * 3):
        super().__init__()
        self.net, self.card = net, card
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def prepare(self, x: Tensor) -> Tensor:
        """Normalised images of this network's size."""
        x, size = x.float() / 255 if x.dtype == torch.uint8 else x, self.card.size_px
        if size and x.shape[-1] != size:
            x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
        x = (x - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)  # training is 1.2 times as fast

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.prepare(x))


def amp_type(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type; "auto" = bf16 where the hardware has it, fp16 on older GPUs, else None."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        amp = "bf16" if torch.cpu._is_avx512_bf16_supported() else "none"
    if amp == "fp16" and device.type == "cpu":
        raise UserError("runtime.amp: fp16 needs a GPU; take bf16, none or auto")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp]


def autocast(amp: str, device: torch.device):
    """Autocast context of amp_type; none on the meta device (of `gflops`)."""
    kind, amp = ("cpu", "none") if device.type == "meta" else (device.type, amp)
    dtype = amp_type(amp, device)
    return torch.autocast(kind, dtype, enabled=dtype is not None)


class TextHead(nn.Module):
    """Zero-shot classifier: exp(logit_scale) cos(h, class embedding) + logit_bias, in float32.
    weight (C,D): the classes' embeddings; nothing here is trained.
    Shapes: image embeddings h (B,D) -> logits (B,C).  Paper: [A] section 4.4."""

    def __init__(self, weight: Tensor, logit_scale: float = 0.0, logit_bias: float = 0.0):
        super().__init__()
        self.register_buffer("weight", F.normalize(weight.float(), dim=-1))
        self.register_buffer("logit_scale", torch.tensor(logit_scale))
        self.register_buffer("logit_bias", torch.tensor(logit_bias))
        self.out_features = len(weight)

    def forward(self, h: Tensor) -> Tensor:
        with autocast("none", h.device):
            cosine = F.normalize(h.float(), dim=-1) @ self.weight.T
            return self.logit_scale.exp() * cosine + self.logit_bias


# ---- weights on disk -----------------------------------------------------------------------------

def read_weights(path: Path | str) -> tuple[dict[str, Tensor], Card | None]:
    """(tensors by name, the Card that `save` wrote beside them or None) of a .safetensors or a
    state dict of torch.save, also in "state_dict" or "model"; nothing is unpickled.  Raises:
    UserError; also where a file of `save` does not hold what was saved."""
    import timm.models
    if not Path(path).is_file():
        raise UserError(f"no weights file {path}")
    try:
        state = timm.models.load_state_dict(str(path), use_ema=False)
        meta = safe_open(path, "pt").metadata() if str(path).endswith(".safetensors") else None
    except Exception as e:  # pickle's and torch's own, of many kinds
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
        raise UserError(f"{path} is no file of plain tensors, and nothing is unpickled here ({why})"
                        ": save its state dict alone, where you trust it: torch.save(torch.load("
                        f"{str(path)!r}, weights_only=False)['state_dict'], 'plain.pt')") from None
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict but {', '.join(map(str, state))[:200]}")
    if "erpm" not in (meta or {}):
        return state, None
    card = json.loads(meta["erpm"]) if meta.get("sha") == sha(meta["erpm"], state) else {}
    if card.keys() != vars(Card()).keys():
        raise UserError(f"{path} is damaged, or of another version of erpm.py: it does not hold "
                        "what was saved; delete it to make it again")
    return state, Card(**card | {"view": View(**card["view"]), "classes": tuple(card["classes"]),
                                 "prompts": tuple(map(tuple, card["prompts"]))})


def load_strictly(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Loads the tensors into the module.  Raises: UserError that says what does not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as e:
        raise UserError(f"{what}: {' '.join(str(e).split())[:400]}") from None


def adopt(net: Net, state: dict[str, Tensor], what: str, classes: int | None) -> None:
    """Loads tensors of the network's own library, or of ours, strictly; timm's position embeddings
    are resized.  The classifier stays new where they have none of that many classes; None = as
    many as they have, without a classifier the network becomes an encoder."""
    state, module = {k.removeprefix("net."): v for k, v in state.items()}, net.net
    adapt = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    state = adapt(state, module) if adapt else state
    own, n = module.state_dict(), net.card.n_classes
    last = list(own)[-1]  # the classifier's bias
    head, theirs = last.rpartition(".")[0], state.get(last)
    fresh = n > 0 and (theirs is None or theirs.shape != own[last].shape)
    if fresh and classes is None:
        fresh, n = False, 0 if theirs is None else len(theirs)
        width = own[f"{head}.weight"].shape[1]
        module.set_submodule(head, nn.Linear(width, n) if n else nn.Identity())
    if fresh:
        state |= {k: v for k, v in own.items() if k.startswith(f"{head}.")}
    load_strictly(module, state, what)
    size = net.card.view.size_px  # no longer of any size
    net.card = dataclasses.replace(net.card, n_classes=n, fresh=fresh, size_px=size)


@contextlib.contextmanager
def from_hub(name: str):
    """Context of what may need a network.  Raises: UserError that names the way without one."""
    was = logging.root.manager.disable
    logging.disable(logging.ERROR)  # open_clip warns of random weights
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # the hubs' errors are of many kinds
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise UserError(f"{name} could not be had ({why}): without a network give its weights as "
                        "a local file, model.student_weights=PATH or NAME=PATH") from None
    finally:
        logging.disable(was)


# ---- the families: (name, classes, weights, size_px) -> Net --------------------------------------

def _cifar(name: str, classes: int | None, weights: str | None, size_px: int) -> Net:
    """resnetD[-wK][-s2]: He et al.'s (2016, 4.2) of depth D = 6n + 2, K times as wide, stride 2."""
    m = re.fullmatch(r"resnet(\d{1,3})(?:-w([1-9]\d?))?(?:-s([12]))?", name)
    if not m or int(m[1]) < 8 or (int(m[1]) - 2) % 6:
        raise UserError(f"unknown network cifar:{name}: expected cifar:resnetD[-wK][-s2] with "
                        "D = 8, 14, 20, ...")
    conv, n_in, n = torchvision.ops.Conv2dNormActivation, 16 * int(m[2] or 1), classes or 10
    layers = [conv(3, n_in, 3, int(m[3] or 1))]
    for level, i in itertools.product(range(3), range((int(m[1]) - 2) // 6)):
        n_out = 2 * n_in if level and not i else n_in
        shortcut = conv(n_in, n_out, 1, 2, activation_layer=None) if n_out > n_in else None
        layers.append(torchvision.models.resnet.BasicBlock(n_in, n_out, n_out // n_in, shortcut))
        n_in = n_out
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    card = Card(n_classes=n, size_px=size_px, view=View(size_px or 32), fresh=True)
    return Net(net, card, (0.5,) * 3, (0.25,) * 3)


def _timm(name: str, classes: int | None, weights: str | None, size_px: int) -> Net:
    """Any network of timm with its own mean, std, input size and view."""
    import timm
    choose(timm.list_models() + timm.list_pretrained(), name, "network of timm")
    cfg, tag = timm.get_pretrained_cfg(name), "." in name
    # position embeddings are of one size; None = timm's own
    net = timm.create_model(name, pretrained=tag and weights is None, num_classes=classes,
                            img_size=size_px or None if cfg.fixed_input_size else None)
    size = size_px or cfg.input_size[-1]
    fixed = size_px or tag or cfg.fixed_input_size  # else as they come
    card = Card(n_classes=net.num_classes, size_px=size if fixed else 0,
                view=View(size, cfg.crop_pct, cfg.interpolation, cfg.crop_mode == "squash"),
                fresh=not tag or weights is not None or cfg.num_classes != net.num_classes)
    return Net(net, card, cfg.mean, cfg.std)


def _torchvision(name: str, classes: int | None, weights: str | None, size_px: int) -> Net:
    """Any classifier of torchvision; a tag gives its weights, their size and view."""
    models, (model, slash, tag) = torchvision.models, name.partition("/")
    choose(models.list_models(module=models), model, "network of torchvision")
    kept, n = models.ResNet18_Weights.DEFAULT, classes or 1000  # without a tag, its view
    if slash:
        tags = dict(models.get_model_weights(model).__members__)
        kept = choose(tags, tag, f"weights of torchvision:{model}")
    t = kept.transforms()
    view = View(size_px or t.crop_size[0], t.crop_size[0] / t.resize_size[0],
                t.interpolation.value)
    card = Card(n_classes=n, size_px=view.size_px if slash else size_px, view=view, fresh=True)
    net = Net(models.get_model(model, weights=None, num_classes=n), card, t.mean, t.std)
    if slash and weights is None:
        adopt(net, kept.get_state_dict(progress=False), f"torchvision:{name}", classes)
    return net


TEXT_TOWERS = weakref.WeakKeyDictionary()  # of networks whose file was read, not of their copies
TINY_CLIP = {  # a whole one, which trains in a minute on a CPU: the student of recipe demo-clip
    "embed_dim": 64, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}


def clip_model(name: str, weights: str | None = None, size_px: int = 0,
               state: dict[str, Tensor] | None = None) -> nn.Module:
    """The whole CLIP MODEL[/TAG] of open_clip, both towers, in eval mode; erpm-tiny is ours.
    weights: None = those of the tag, a file of the whole model (state: its tensors, if already
    read), or "random".  It normalises as the tag does, or its model's first.  Raises: UserError."""
    import open_clip
    model, slash, tag = name.partition("/")
    open_clip.factory._MODEL_CONFIGS.setdefault("erpm-tiny", TINY_CLIP)
    choose(open_clip.list_models(), model, "network of open_clip")
    tags = open_clip.list_pretrained_tags_by_model(model)
    tag = choose(tags, tag, f"weights of open_clip:{model}") if slash else next(iter(tags), "")
    cfg = open_clip.get_pretrained_cfg(model, tag)
    source = {None: tag if slash else None, "random": None}.get(weights, weights)
    if weights not in (None, "random"):
        state = state or read_weights(weights)[0]  # once, and says what is wrong with the file
    given = mock.patch("open_clip.factory.load_state_dict", lambda *args, **more: dict(state))
    with from_hub(f"open_clip:{name}"), given if state else contextlib.nullcontext():
        clip = open_clip.create_model(
            model, source, force_quick_gelu=slash and cfg.get("quick_gelu", False),
            force_image_size=size_px or None, force_preprocess_cfg=cfg, pretrained_text=False)
    return clip.eval()


def _open_clip(name: str, classes: int | None, weights: str | None, size_px: int, state: dict):
    """The visual tower of a CLIP with a linear head; None = without, it gives embeddings."""
    import open_clip
    clip = clip_model(name, weights, size_px, state)
    clip.visual.output_tokens = False  # CoCa's tower gives a pair otherwise
    cfg, size = open_clip.get_model_preprocess_cfg(clip), int(np.max(clip.visual.image_size))
    width = open_clip.get_model_config(name.partition("/")[0])["embed_dim"]
    fc = nn.Linear(width, classes) if classes else nn.Identity()
    view = View(size, 1.0, cfg["interpolation"], cfg["resize_mode"] == "squash")
    card = Card(n_classes=classes or 0, size_px=size, view=view, clip=weights or "",
                fresh=bool(classes) or not weights and "/" not in name)
    net = Net(nn.Sequential(OrderedDict(visual=clip.visual, fc=fc)), card, cfg["mean"], cfg["std"])
    if not card.fresh and weights != "random":
        clip.visual, TEXT_TOWERS[net] = None, clip
    return net


def named(name: str, classes: int | None = None, weights: str | None = None,
          size_px: int = 0) -> Net:
    """The network FAMILY:NAME in eval mode; arguments as of `build`, which knows more names."""
    family, _, rest = name.partition(":")
    make = choose({"timm": _timm, "torchvision": _torchvision, "open_clip": _open_clip,
                   "cifar": _cifar}, family, "family of networks (expected FAMILY:NAME)")
    state, ours = read_weights(weights) if weights not in (None, "", "random") else ({}, None)
    own = [state] if family == "open_clip" else []  # which loads both towers itself
    with from_hub(name):
        net = make(rest, classes, weights or None, size_px, *own)
    more = {"name": name}
    if state and not own:
        adopt(net, state, f"{weights} does not fit {name}", classes)
    if net.card.n_classes == len(synsets()) and not net.card.fresh:  # a public network's
        more |= {"home": "imagenet", "classes": synsets()}
    if ours:  # it sees images as when it was made
        kept = ("home", "classes") if size_px else ("home", "classes", "size_px", "view")
        more |= {k: vars(ours)[k] for k in kept}
    net.card = dataclasses.replace(net.card, **more)
    return net.eval()


# ---- stages --------------------------------------------------------------------------------------

def part_of(net: nn.Module, forward: Callable, off: Iterable) -> nn.Module:
    """A copy with the same tensors and another forward, f(part, x); what is off does nothing."""
    memo = {id(t): t for t in (*net.parameters(), *net.buffers())}
    memo |= {id(m): nn.Sequential() if isinstance(m, nn.Module) else None for m in off}
    part = copy.deepcopy(net, memo)
    part.forward = types.MethodType(forward, part)
    return part


class Classifier(nn.Module):
    """The last stage: features (norm, pooling, projection), dropout, and fc: a Linear, or any
    module from (B,D) to (B, fc.out_features).  Shapes: boundary features -> logits (B,C)."""

    def __init__(self, features: nn.Module, fc: nn.Module):
        super().__init__()
        self.features, self.drop, self.fc = features, nn.Identity(), fc

    def forward(self, f: Tensor) -> Tensor:
        h = self.drop(self.features(f))
        with autocast("none", h.device):  # logits in float32: sigma, KL, ties
            return self.fc(h.float())


# By class: the forwards of what is before the blocks, and of what is behind but the classifier.
CHAIN = (lambda n, x: nn.Sequential(*n.children())(x),) * 2
TOKENS = (lambda n, x: n.forward_features(x),
          lambda n, x: n.forward_head(n.norm(x), pre_logits=True))
CUTS = {
    "timm.VisionTransformer": TOKENS, "timm.Eva": TOKENS, "timm.MlpMixer": TOKENS,
    "timm.ResNet": CHAIN, "timm.RegNet": CHAIN, "timm.ConvNeXt": CHAIN,
    "timm.EfficientNet": CHAIN, "timm.MobileNetV3": CHAIN, "open_clip.ModifiedResNet": CHAIN,
    "timm.SwinTransformer": CHAIN, "timm.SwinTransformerV2": CHAIN,
    "torchvision.ResNet": (CHAIN[0], lambda n, x: n.avgpool(x).flatten(1)),
    "open_clip.VisionTransformer": (
        lambda n, x: n._embeds(x),
        lambda n, x: n._pool(x)[0] if n.proj is None else n._pool(x)[0] @ n.proj),
}


def _split_known(net: nn.Module, early: Callable, late: Callable):
    """`split_net` of a class of CUTS."""
    def roped(i: int, n: nn.Module, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1] - net.num_prefix_tokens)  # all images are square
        rope = n.rope.get_embed(shape=(side, side))
        return n.block(x, rope=rope[i] if net.rope_mixed else rope)

    own = net._parameters | net._buffers | net._modules
    names = [k for k, m in own.items() if m is not None]
    names.sort(key=lambda k: k == "proj")  # CLIP's proj is used last
    at = [i for i, k in enumerate(names)
          if re.fullmatch(r"blocks|layers|stages|transformer|layer\d|s\d", k)]
    members, first, last, blocks = [own[k] for k in names], at[0], at[-1] + 1, []
    for m in itertools.chain(*(m.children() for m in members[first:last])):
        blocks += m if type(m) in (nn.Sequential, nn.ModuleList) else [m]
    for i, block in enumerate(blocks if "rope" in names else ()):  # each takes it too
        blocks[i] = nn.ModuleDict({"block": block, "rope": net.rope})
        blocks[i].forward = types.MethodType(functools.partial(roped, i), blocks[i])
    fc = net.get_classifier() if hasattr(net, "get_classifier") else getattr(net, "fc", None)
    fc = fc or nn.Identity()
    return ([part_of(net, early, members[first:]), *blocks],
            [part_of(net, late, [*members[:last], fc]), fc])


def split_net(net: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """(stages, tail) of net: one after another they are net(x); the tail is norm, pooling,
    projection and, last, a classifier.  In an nn.Sequential a child with weights opens a stage,
    those without join the one before; a tower that comes first is split.  Raises: UserError."""
    kind = f"{type(net).__module__.partition('.')[0]}.{type(net).__name__}"
    if kind in CUTS:
        return _split_known(net, *CUTS[kind])
    if kind == "open_clip.TimmModel":
        net = nn.Sequential(net.trunk, net.head)
    if type(net) is not nn.Sequential or not len(net):
        raise UserError(f"a {kind} cannot be cut into stages: known are {', '.join(CUTS)}; or "
                        "pass an nn.Sequential of your own that ends in a Linear")
    if type(net[0]) is not nn.Sequential:
        with contextlib.suppress(UserError):
            body, tail = split_net(net[0])
            return body, [*tail, *net[1:]]
    opens = [i for i, m in enumerate(net[:-1]) if i == 0 or list(m.parameters())]
    end = opens[-1] + 1 if opens else 0
    return [net[i:j] for i, j in itertools.pairwise([*opens, end])], [*net[end:]]


def stages(net: nn.Module) -> nn.Sequential:
    """The same function as net, and its own tensors, as a list of cuttable stages; the last is a
    Classifier.  Raises: UserError for what cannot be cut."""
    if isinstance(net, Net):
        return nn.Sequential(part_of(net, Net.prepare, [net.net]), *stages(net.net))
    body, (*features, fc) = split_net(net)
    if not body or not hasattr(fc, "out_features"):
        raise UserError(f"a {type(net).__module__}.{type(net).__name__} without a final Linear "
                        "layer cannot be cut: build it with classes=N")
    return nn.Sequential(*body, Classifier(nn.Sequential(*features), fc))


def freeze(module: nn.Module) -> nn.Module:
    """The module in eval mode, without gradients."""
    return module.eval().requires_grad_(False)


@torch.no_grad()
def cut(net: Net, tune: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(frozen backbone, tail): the tail is the last `tune` stages and the classifier.
    Raises: UserError; also unless the stages give what the network gives on a random image."""
    parts, card = stages(net), net.card
    at, name = len(parts) - 1 - tune, card.name or "the network"
    if at < 1:
        raise UserError(f"tune = {tune}: {name} has {len(parts) - 1} stages, of which the first "
                        "stays frozen")
    if card.name or type(net.net) is not nn.Sequential:  # one's own is in order, and of any size
        side = card.size_px or card.view.size_px
        x = torch.rand(1, 3, side, side, generator=rng("cut")).to(net.mean.device)
        if not torch.allclose(parts.eval()(x), net.eval()(x), rtol=1e-3, atol=1e-5):
            raise UserError(f"the stages of {name} do not give what it gives: this version of its "
                            "library computes something else")
    return freeze(parts[:at]), parts[at:]


# ---- visual prompts ------------------------------------------------------------------------------

def prompted(net: Net, n: int = 10, deep: bool = True) -> Net:
    """The ViT with n prompt tokens, in place: deep = new ones before every block, else before the
    first.  They stand behind the other tokens, have no position and are off before the pooling.
    Paper: VPT (Jia et al. 2022).  Raises: UserError on what is no ViT of timm or open_clip."""
    def put(block: nn.Module, args: tuple) -> tuple:
        x, *others = args
        return torch.cat([x, block.prompt.to(x.dtype).expand(len(x), -1, -1)], 1), *others

    _, early, *blocks, _ = stages(net)
    if type(early).__name__ != "VisionTransformer":
        raise UserError(f"vpt: {net.card.name or 'the network'} has no tokens to add prompts to: "
                        "take a ViT of timm or open_clip")
    [width] = next(m.normalized_shape for m in blocks[0].modules() if isinstance(m, nn.LayerNorm))
    for block in blocks if deep else blocks[:1]:
        block.prompt = nn.Parameter(torch.empty(n, width).uniform_(-1, 1) * (6 / width) ** 0.5)
        block.register_forward_pre_hook(put)
    for block in blocks if deep else blocks[-1:]:
        block.register_forward_hook(lambda block, args, x: x[:, :x.shape[1] - n])
    made = net.card.made | {"prompted": {"n": n, "deep": deep}}
    net.card = dataclasses.replace(net.card, made=made)
    return net


# ---- the VQGAN of [B] ----------------------------------------------------------------------------

# Published checkpoints by name, and one that is trained here; taming-transformers' words, and the
# groups of a norm: 32 there, but with as few channels they would take the colour away.
VQGAN_WORDS = ("n_embed", "embed_dim", "z_channels", "ch", "ch_mult", "num_res_blocks",
               "attn_resolutions", "resolution", "groups")
VQGANS = {
    "vqgan_openimages_f8_16384": (16384, 4, 4, 128, (1, 2, 2, 4), 2, (32,), 256, 32),
    "vqgan_imagenet_f16_1024": (1024, 256, 256, 128, (1, 1, 2, 2, 4), 2, (16,), 256, 32),
    "tiny_f2_256": (256, 8, 32, 32, (1, 1), 0, (), 32, 4),
}


class ResBlock(nn.Module):
    """Two convolutions behind group norm and swish, and what they are added to."""

    def __init__(self, n_in: int, n_out: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, n, 1e-6) for n in (n_in, n_out))
        self.conv1, self.conv2 = (nn.Conv2d(n, n_out, 3, 1, 1) for n in (n_in, n_out))
        self.nin_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """Single-head attention over all places, added to its input."""

    def __init__(self, n: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, n, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT for f in (self.q, self.k, self.v))  # (B,HW,C)
        h = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
        return x + self.proj_out(h)


class Coder(nn.Module):
    """Encoder of a VQGAN, images (B,3,S,S) in [-1, 1] -> (B, z_channels, s, s), or its decoder."""

    def __init__(self, c: dict, down: bool):
        super().__init__()
        widths, groups = [c["ch"] * m for m in c["ch_mult"]], c["groups"]
        width, order = c["ch"] if down else widths[-1], range(len(widths))[::1 if down else -1]
        steps, levels = [], nn.ModuleList(nn.ModuleDict(
            {"block": nn.ModuleList(), "attn": nn.ModuleList()}) for _ in widths)
        self.conv_in = nn.Conv2d(3 if down else c["z_channels"], width, 3, 1, 1)
        for i in order:
            for _ in range(c["num_res_blocks"] + (not down)):
                steps.append(ResBlock(width, widths[i], groups))
                levels[i]["block"].append(steps[-1])
                width = widths[i]
                if c["resolution"] >> i in c["attn_resolutions"]:
                    steps.append(SpatialAttention(width, groups))
                    levels[i]["attn"].append(steps[-1])
            if i != order[-1]:
                first = nn.ZeroPad2d((0, 1, 0, 1)) if down else nn.Upsample(scale_factor=2.0)
                conv = nn.Conv2d(width, width, 3, *((2, 0) if down else (1, 1)))
                steps.append(nn.Sequential(OrderedDict(first=first, conv=conv)))
                levels[i]["downsample" if down else "upsample"] = steps[-1]
        self.add_module("down" if down else "up", levels)
        block = functools.partial(ResBlock, widths[-1], widths[-1], groups)
        self.mid = nn.Sequential(OrderedDict(
            block_1=block(), attn_1=SpatialAttention(widths[-1], groups), block_2=block()))
        self.norm_out = nn.GroupNorm(groups, width, 1e-6)
        self.conv_out = nn.Conv2d(width, c["z_channels"] if down else 3, 3, 1, 1)
        steps = [*steps, self.mid] if down else [self.mid, *steps]
        self.steps = [self.conv_in, *steps, self.norm_out, nn.SiLU(), self.conv_out]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class VQGAN(nn.Module):
    """Images in [0, 1] -> the same as seen through a codebook, in [0, 1]: decode(quantise(encode)).

    config: a name of VQGANS, a YAML file of taming-transformers, or a mapping of its words, also
    nested as "ddconfig".  weights: a local file as of read_weights, loaded strictly but for its
    losses ("loss.*").  Names and shapes of tensors are those of taming-transformers' VQModel
    (Esser et al. 2021).  Shapes: (B,3,S,S), S a multiple of `factor`.  Raises: UserError."""

    def __init__(self, config: str | dict, weights: Path | str | None = None):
        super().__init__()
        try:
            if isinstance(config, str) and config.endswith((".yaml", ".yml")):
                config = read_yaml(Path(config), yaml.SafeLoader)["model"]["params"]
            elif isinstance(config, str):
                config = dict(zip(VQGAN_WORDS, choose(VQGANS, config, "vqgan.name")))
            config = {"groups": 32, **config, **config.get("ddconfig", {})}
            self.factor = 2 ** (len(config.get("ch_mult", [])) - 1)
        except (AttributeError, KeyError, TypeError):
            raise UserError("vqgan: expected {model: {params: {ddconfig: {...}}}}") from None
        if lacks := [k for k in VQGAN_WORDS if k not in config]:
            raise UserError(f"vqgan: the configuration lacks {', '.join(lacks)}")
        z, e, n = config["z_channels"], config["embed_dim"], config["n_embed"]
        self.card = Card("vqgan", made={"vqgan": {k: config[k] for k in VQGAN_WORDS}})
        self.encoder, self.decoder = Coder(config, True), Coder(config, False)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(n, e)})
        nn.init.uniform_(self.quantize.embedding.weight, -1 / n, 1 / n)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, e, 1), nn.Conv2d(e, z, 1)
        if weights:
            state = {k: v for k, v in read_weights(weights)[0].items() if not k.startswith("loss.")}
            load_strictly(self, state, f"{weights} does not fit the VQGAN")

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """(B,s,s): the code that is nearest by squared L2, in float32."""
        codes = self.quantize.embedding.weight
        flat = z.float().permute(0, 2, 3, 1).flatten(0, 2)  # (B s s, E)
        with autocast("none", z.device):  # all but |z|^2, which is the same for all
            near = [torch.addmm(codes.square().sum(1), some, codes.T, alpha=-2).argmin(1)
                    for some in flat.split(2 ** 14)]
        return torch.cat(near).view(len(z), *z.shape[2:])

    def forward(self, x: Tensor, free: float | None = None):
        """The images as the codes show them; in training, with a share `free` of places that are
        not quantised, (images, not clamped, z, codes)."""
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise UserError(f"vqgan: images of {x.shape[-1]} px are no multiple of {self.factor}: "
                            "set data.size_px, or take another vqgan.name")
        z = self.quant_conv(self.encoder(2 * x - 1))  # (B,E,s,s)
        q = self.quantize.embedding(self.nearest(z)).permute(0, 3, 1, 2)  # (B,E,s,s)
        seen = z + (q - z).detach()  # the gradient goes straight through
        if free is not None:
            skips = torch.rand(len(z), 1, *z.shape[2:], device=z.device) < free
            seen = torch.where(skips, z, seen)
        seen = self.decoder(self.post_quant_conv(seen)).float() / 2 + 0.5
        return seen.clamp(0, 1) if free is None else (seen, z, q)


vqgan = VQGAN  # as other projects call it


# ---- zero-shot: prompts in the place of a classifier ---------------------------------------------

def prompts_of(images: ImageSet, templates: str = "", names: str = "") -> tuple[tuple, tuple]:
    """(names, templates) of the classes that a network answers with on a set.
    names: a file; "" = OpenAI's where the classes are synsets, else the set's own, _ and - as
    spaces.  templates: a file; "" = OpenAI's 80 for ImageNet, else a photo of a {}."""
    import open_clip
    known, lines = dict(zip(synsets(), open_clip.IMAGENET_CLASSNAMES)), ["a photo of a {}."]
    classes = [known.get(c, re.sub("[_-]+", " ", c)) for c in images.outputs]
    if names and len(given := read_lines(names)) == len(classes):
        classes = given                                   # else they are of another set's classes
    if templates:
        lines = read_lines(templates)
    elif images.outputs == synsets():
        lines = [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    if not lines or any(t.count("{}") != 1 for t in lines):
        raise UserError(f"model.templates: expected lines with one {{}} for the class, got {lines}")
    return tuple(classes), tuple(lines)


def zero_shot(model: nn.Module, prompts: tuple) -> nn.Module:
    """The same network or Student, its weights shared, for the classes of (names, templates), whose
    embeddings are those of open_clip.build_zero_shot_classifier.  Raises: UserError."""
    import open_clip
    card, device = model.card, pick_device()
    if card.prompts == prompts:
        return model
    texts, clip = model.__dict__.setdefault("texts", {}), TEXT_TOWERS.get(model)
    if prompts not in texts:  # a text tower is slow, and sets are alike
        with from_hub(f"the text tower of {card.name}"):
            name = card.name.partition(":")[2]
            clip = clip or clip_model(name, card.clip or None, card.size_px)
            tokenizer = open_clip.get_tokenizer(name.partition("/")[0])
        weight = open_clip.build_zero_shot_classifier(
            clip.to(device), tokenizer, *prompts, device=device).T.float().cpu().contiguous()
        clip.cpu()                                       # room for the next one's
        scale = (v.item() if v is not None else 0.0 for v in (clip.logit_scale, clip.logit_bias))
        texts[prompts] = TextHead(weight, *scale)
    head = copy.deepcopy(texts[prompts]).to(next(model.parameters()).device)
    old = [m for m in model.modules() if isinstance(m, TextHead)] or [model.net.fc]
    new = {id(t): t for t in (*model.parameters(), *model.buffers())}
    out = copy.deepcopy(model, new | {id(m): head for m in old})
    out.card = dataclasses.replace(card, n_classes=head.out_features, prompts=prompts, classes=())
    return out


# ==== 7. METHOD ====
# In: boundary features of x and x~, logits of both teachers.  Out: the losses of [A] eq. 3-5, and
# at inference the head that answers ([A] eq. 6).  Always: the frozen part stays equal bit for bit.


class Heads(NamedTuple):
    """Logits of the three heads, (B,C) each."""
    clean: Tensor
    combined: Tensor
    robust: Tensor


HEADS = Heads._fields  # of what is in this order [:, ::2] is of the clean and the robust head


class Prediction(NamedTuple):
    """probs (B,C) of the head that answers; head (B,) in HEADS; sigma, kl (B,2): clean, robust."""
    probs: Tensor
    head: Tensor
    sigma: Tensor
    kl: Tensor


class Dropout(nn.Module):
    """Dropout with three modes: training (random), off, and sampling, T passes as one batch.
    METHOD [A] section 3.3: T stochastic passes.  The T masks are functions of the key alone and the
    same for every image: T sub-networks, so that no answer depends on the rest of its batch."""
    sample = None  # of the class, set by Student.moments: off, or (T, copies of the images in x)

    def __init__(self, p: float, key: int):
        super().__init__()
        self.p, self.key = p, key
        self.masks = torch.empty(0)  # the last masks drawn, (T, *features)

    def forward(self, x: Tensor) -> Tensor:
        if self.sample is None:
            return F.dropout(x, self.p, self.training)
        t, copies = self.sample
        if self.masks.shape != (t, *x.shape[1:]) or self.masks.device != x.device:
            masks = torch.rand(t, *x.shape[1:], generator=rng("mask", self.key)) >= self.p
            self.masks = (masks / (1 - self.p)).to(x.device)
        return (x.unflatten(0, (copies, -1)) * self.masks[:, None].to(x.dtype)).flatten(0, 1)


def tunable(stage: nn.Module, key: int, p: float, where: str) -> nn.Module:
    """A copy of the stage to be trained, with dropout of rate p: before the Linear of a Classifier;
    with where = "tail" else behind its own dropout layers (which stay off), or the ends of its
    residual branches where it is a block of open_clip, or itself where it has neither."""
    stage = copy.deepcopy(stage).requires_grad_(True)
    if isinstance(stage, Classifier):
        stage.drop = Dropout(p, key)
    if isinstance(stage, Classifier) or where == "head":
        return stage
    spots = [(m, k, c) for m in stage.modules() for k, c in m.named_children()
             if k in ("ls_1", "ls_2")
             or isinstance(c, nn.Dropout) and k != "attn_drop"]  # a fused kernel reads attn_drop.p
    for i, (module, name, child) in enumerate(spots):
        setattr(module, name, nn.Sequential(child, Dropout(p, fold(key, i))))
    return stage if spots else nn.Sequential(stage, Dropout(p, fold(key)))


class Tuned(nn.Sequential):
    """Stages of a pretrained network: in training mode only our dropout is switched on, so
    BatchNorm keeps the pretrained statistics, unless norms = "own"."""
    norms = "frozen"

    def train(self, mode: bool = True):
        kinds = (Dropout, nn.modules.batchnorm._BatchNorm) if self.norms == "own" else Dropout
        for m in self.modules():
            m.training = mode and (m is self or isinstance(m, kinds))
        return self


class ThreeHeads(Tuned):
    """Shared tail with dropout and three heads; the only part of a Student that is trained."""

    def __init__(self, tail: nn.Sequential, head: int, dropout: float, dropout_in: str):
        super().__init__()
        tuned, n = functools.partial(tunable, p=dropout, where=dropout_in), len(tail) - 1 - head
        self.shared = nn.Sequential(*(tuned(s, i) for i, s in enumerate(tail[:n])))
        self.heads = nn.ModuleDict({name: nn.Sequential(
            *(tuned(s, fold(name, i)) for i, s in enumerate(tail[n:]))) for name in HEADS})

    def forward(self, f: Tensor, n_clean: int | None = None) -> Heads:
        """Logits of all heads; with n_clean the clean head sees f[:n_clean] alone, the robust head
        f[n_clean:] alone and the combined head everything, as [A] trains them."""
        f, head = self.shared(f), self.heads
        x, noisy = (f, f) if n_clean is None else (f[:n_clean], f[n_clean:])
        return Heads(head["clean"](x), head["combined"](f), head["robust"](noisy))


TINY = 1e-12  # a KL of 0, to the last bit, would decide every product; and log 0 is not finite


def divergence(mean: Tensor) -> Tensor:
    """KL(head || combined) of the clean and the robust head, (B,2) in nats, from mean (B,3,C).
    METHOD [A] section 3.3: on very noisy input the clean head may collapse onto a random class with
    a small sigma; far from the combined head it is not believed."""
    log = mean.float().clamp_min(TINY).log()
    return (mean[:, ::2].float() * (log[:, ::2] - log[:, 1:2])).sum(-1).clamp_min(0)


# METHOD [A] eq. 6: the head with the least objective answers.  s sigma, d divergence, m mean of
# clean and robust, (B,2) or (B,2,C); z logits, y labels.  [A] does not state: product or sum.
OBJECTIVES: dict[str, Callable] = {
    "product": lambda s, d, m, z, y: (s + TINY) * (d + TINY),
    "sum": lambda s, d, m, z, y: s + d,
    "sigma": lambda s, d, m, z, y: s,
    "kl": lambda s, d, m, z, y: d,
    "max-logit": lambda s, d, m, z, y: -z[:, ::2].amax(-1),
    "entropy": lambda s, d, m, z, y: -(m * m.clamp_min(TINY).log()).sum(-1),
    "soft": lambda s, d, m, z, y: (s + TINY) * (d + TINY),   # for head; see `answer`
    "oracle": lambda s, d, m, z, y: (m.argmax(-1) != y[:, None]).int(),
}
RULES = (*HEADS, *OBJECTIVES)


def select(mean: Tensor, sigma: Tensor, rule: str = "product", *, logits: Tensor | None = None,
           y: Tensor | None = None) -> Tensor:
    """Index into HEADS of the head that answers each image, (B,).
    Shapes: mean (B,3,C) probabilities in the order of HEADS, sigma (B,2) of clean and robust,
    logits (B,3,C) for "max-logit", labels y (B,) for "oracle" (clean unless only robust is right).
    Paper: [A] eq. 6.  Raises: UserError on an unknown rule, a missing input."""
    choose(RULES, rule, "rule")
    if rule in HEADS:
        return torch.full((len(mean),), HEADS.index(rule), device=mean.device)
    if rule == "oracle" and y is None or rule == "max-logit" and logits is None:
        raise UserError(f"rule {rule!r} needs the {'labels' if rule == 'oracle' else 'logits'}")
    least = OBJECTIVES[rule](sigma, divergence(mean), mean[:, ::2], logits, y).argmin(-1)
    return 2 * least                                         # 0 clean, 2 robust


def answer(mean: Tensor, sigma: Tensor, head: Tensor, rule: str) -> Tensor:
    """Probabilities (B,C) of the answering head; "soft" mixes clean and robust by 1/(sigma KL)."""
    if rule != "soft":
        return mean[torch.arange(len(mean), device=mean.device), head]
    weight = 1 / ((sigma + TINY) * (divergence(mean) + TINY))
    return (mean[:, ::2] * F.normalize(weight, p=1, dim=-1)[..., None]).sum(1)


def project(z: Tensor, ids: Tensor | None) -> Tensor:
    """Logits (..., N) -> (..., C): the largest of each class's outputs, ids (C,k); None = as is."""
    return z if ids is None else z[..., ids.to(z.device)].amax(-1)


class Student(nn.Module):
    """[A] fig. 2: a frozen network whose last `tune` stages are tuned, with three heads.

    net: a Net, or any module from images in [0, 1] to logits that `stages` can cut; its modules
    become the frozen backbone and the clean head's teacher.  tune: stages tuned; head: of these the
    last ones that each head has for itself.  dropout_in: "tail" as [A] (tuned stages, classifiers),
    "head" = before these only.  forward(x) -> Heads; x (B,3,H,W), uint8 or in [0, 1]."""

    def __init__(self, net: nn.Module, tune: int = 2, head: int = 2, dropout: float = 0.1, *,
                 dropout_in: str = "tail"):
        super().__init__()
        net = net if isinstance(net, Net) else Net(net)
        if not 0 <= head <= tune:
            raise UserError(f"head = {head}: expected 0 to tune = {tune}")
        if not 0 < dropout < 1:
            raise UserError(f"dropout = {dropout}: expected less than 1 and, for sigma, above 0")
        backbone, tail = cut(net, tune)
        self.backbone, self.original = Tuned(*backbone), Tuned(*freeze(tail))
        self.tuned = ThreeHeads(tail, head, dropout, dropout_in)
        self.dropout, self.early = dropout, dropout_in == "tail" and tune > 0
        made = dict(tune=tune, head=head, dropout=dropout, dropout_in=dropout_in)
        self.card = dataclasses.replace(net.card, n_classes=tail[-1].fc.out_features,
                                        made=net.card.made | {"student": made})

    def forward(self, x: Tensor) -> Heads:
        return self.tuned(self.backbone(x))

    @torch.no_grad()
    def moments(self, f: Tensor, passes: int = 10, ids: Tensor | None = None) \
            -> tuple[Tensor, Tensor, Tensor]:
        """(mean probabilities (B,3,C), sigma (B,2), mean logits (B,3,C)) from boundary features f.

        sigma: standard deviation over the dropout passes of the probability of the class that the
        head predicts, of the clean and robust head.  passes = 0: closed form, exact to first order
        for dropout before the classifiers, the only one then.  ids: the outputs that count, for
        sets of fewer classes.  Paper: [A] section 3.3; differs: all images share the T masks."""
        self.eval()
        if not passes:
            return self._closed_form(f, ids)
        copies, size = (passes, 2 ** 20 // passes) if self.early else (1, f.numel())
        Dropout.sample = passes, copies
        try:
            parts = [self.tuned(torch.cat([f[s]] * copies)) for s in slices(f, size)]  # in a cache
        finally:
            Dropout.sample = None
        z = [torch.stack(heads, 1).float().unflatten(0, (passes, -1)) for heads in parts]
        z = project(torch.cat(z, 1), ids)                                        # (T,B,3,C)
        p = z.softmax(-1)
        mean = p.mean(0)
        top = mean.argmax(-1, keepdim=True).expand(passes, -1, -1, -1)
        sigma = p.gather(-1, top)[..., 0].std(0, correction=0)                   # (B,3)
        return mean, sigma[:, ::2], z.mean(0)

    def _closed_form(self, f: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`moments` to first order: dropout moves a feature h_i by variance h_i^2 p/(1-p), and
        p_top by d p_top / d h, which autograd knows."""
        f, found, q = self.tuned.shared(f), [], self.dropout / (1 - self.dropout)
        for *blocks, last in self.tuned.heads.values():
            h = last.features(nn.Sequential(*blocks)(f)).float()                 # (B,D)
            with torch.enable_grad(), autocast("none", f.device):
                h = h.detach().requires_grad_()
                z = project(last.fc(h.view_as(h)).float(), ids)  # a leaf stops FLOP counters
                [g] = torch.autograd.grad(z.softmax(-1).amax(-1).sum(), h)  # image by image
            found.append((z.detach(), (q * (g * h.detach()).square().sum(-1)).sqrt()))
        z, sigma = (torch.stack(v, 1) for v in zip(*found))                      # (B,3,C), (B,3)
        return z.softmax(-1), sigma[:, ::2], z

    def predict(self, x: Tensor, passes: int = 10, rule: str = "product") -> Prediction:
        """What the chosen head says, in eval mode.  passes: of dropout, 0 = closed form.  rule: one
        of RULES that needs no label."""
        mean, sigma, logits = self.moments(self.backbone(x), passes)
        head = select(mean, sigma, rule, logits=logits)
        return Prediction(answer(mean, sigma, head, rule), head, sigma, divergence(mean))


# ---- the team: the robust teacher stays --------------------------------------------------------

def team(clean: Tensor, robust: Sequence[Tensor], tau: float = 0.5) -> Tensor:
    """Probabilities (B,C) of a clean answer and several robust ones, (B,C) each; tau in nats.
    METHOD ours: r = the mean of the robust answers; the clean one weighs exp(-KL(clean||r) / tau),
    so that it is heard unless they contradict it, and r the rest.  Nothing is fitted."""
    r = sum(robust) / len(robust)
    gap = clean.clamp_min(TINY).log() - r.clamp_min(TINY).log()
    w = (-(clean * gap).sum(-1, keepdim=True) / tau).exp().clamp(max=1)
    return w * clean + (1 - w) * r


class Team(nn.Module):
    """A network and the robust teacher, which stays beside it: they answer by `team`.
    net: a Net, whose answer is the clean one, or a Student, whose last head is a robust one; tune:
    the last so many stages of a Net stand twice on its frozen backbone, as they were and as a copy
    that is to become robust.  forward(x) -> log probabilities (B,C)."""

    def __init__(self, net: nn.Module, teacher: Net, tune: int | None = None):
        super().__init__()
        t = teacher.card
        made = {"tune": tune, "teacher": [t.name, t.n_classes, "random", t.size_px]}
        self.card = dataclasses.replace(net.card, made=net.card.made | {"team": made})
        self.net, self.teacher, self.tails = net, teacher, nn.ModuleList()
        if tune is not None:
            self.net, tail = cut(net, tune)
            self.tails.extend([freeze(tail), copy.deepcopy(tail).requires_grad_(True)])

    def forward(self, x: Tensor, ask: Callable = operator.call) -> Tensor:
        """ask: (module, x) -> its output, which may be known already."""
        z = ask(self.net, x)
        if self.tails:
            z = [tail(z) for tail in self.tails]
        z = [z] if isinstance(z, Tensor) else [z[0], z[-1]]
        clean, *robust = (v.float().softmax(-1) for v in (*z, ask(self.teacher, x)))
        return team(clean, robust).clamp_min(TINY).log()


# ---- losses, and the samples of [B] --------------------------------------------------------------

def kd(z: Tensor, teacher: Tensor, t: float) -> Tensor:
    """t^2 KL(softmax(teacher/t) || softmax(z/t)) of logits (B,C), in float32, the batch's mean."""
    log_p, log_q = (F.log_softmax(v.float() / t, -1) for v in (teacher, z))
    return t * t * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def erpm_loss(z: Heads, z0: Tensor, zt: Tensor, y: Tensor, *, alpha: float, t: float,
              smoothing: float = 0.0) -> dict[str, Tensor]:
    """{part: loss} of a batch of b clean and b augmented images; their sum is minimised.

    Shapes: z.clean, z.robust (b,C), z.combined (2b,C) clean first; z0 = initial model on the clean,
    zt = robust teacher on the augmented images, (b,C) each; y (b,).
    Paper: [A] eq. 5 = eq. 3 + eq. 4; the form of their "weighted sum of classification and
    distillation loss", (1-a) CE(z, y) + a t^2 KL(softmax(teacher/t) || softmax(z/t)), is ours."""
    def loss(z: Tensor, teacher: Tensor) -> Tensor:
        ce = F.cross_entropy(z.float(), y, label_smoothing=smoothing)
        return (1 - alpha) * ce + alpha * kd(z, teacher, t)

    b = len(y)
    # METHOD [A] eq. 3: clean images, the initial model teaches; eq. 4: augmented ones, the robust
    return {"clean": loss(z.clean, z0), "combined_clean": loss(z.combined[:b], z0),
            "robust": loss(z.robust, zt), "combined_robust": loss(z.combined[b:], zt)}


@torch.no_grad()
def dad_samples(x: Tensor, y: Tensor, teacher: nn.Module, vqgan: VQGAN, generator, *,
                radius: float = 0.1, step: float = 0.1, steps: int = 1, start: float = 0.8,
                through: bool = False) -> Tensor:
    """Discrete adversarial samples x' of images, (B,3,S,S) in [0, 1].

    Shapes: x (B,3,S,S), uint8 or in [0, 1]; y (B,).  teacher: images in [0, 1] -> logits.
    generator: on the CPU, one, or one for each image.  radius, step: L2 norms, of the ball around
    the reconstruction and of a step.  start: probability of a random start.  through: the gradient
    crosses the quantiser, straight through.  Paper: [B]'s algorithm, as its code has it."""
    each = [generator] * len(x) if isinstance(generator, torch.Generator) else generator
    some = draw(each, (1, 1, 1), "uniform_") < start
    noise = draw(each, x.shape[1:], "normal_", near=x) * on(x, some)
    x0 = vqgan(x.float() / 255 if x.dtype == torch.uint8 else x)
    v = (x0 + radius * F.normalize(noise, dim=(1, 2, 3))).clamp(0, 1)
    for _ in range(steps):
        with torch.enable_grad():
            v.requires_grad_()
            z = teacher(vqgan(v) if through else v.view_as(v))  # a leaf stops FLOP counters
            [g] = torch.autograd.grad(F.cross_entropy(z.float(), y, reduction="sum"), v)
        # METHOD [B]: an ascent step on the teacher's loss, then back into the ball
        d = v + step * F.normalize(g, dim=(1, 2, 3)) - x0
        v = (x0 + d.renorm(2, 0, radius)).clamp(0, 1)
    return vqgan(v)


def dad_loss(z: Tensor, zt: Tensor, y: Tensor, t: float = 4.0, smoothing: float = 0.0) \
        -> dict[str, Tensor]:
    """{part: loss}, to be summed, of a student on b images x and, where they follow, b samples x'.
    Shapes: z of the student, zt of its teacher, (b or 2b,C); y (b,), or soft (b,C).  Paper: [B]."""
    b = len(y)
    # METHOD [B]: CE(s(x), y) + t^2/2 KL(t(x) || s(x)) + t^2/2 KL(t(x') || s(x'))
    parts = {"ce": F.cross_entropy(z[:b].float(), y, label_smoothing=smoothing),
             "kd": kd(z[:b], zt[:b], t) / 2}
    return parts if len(z) == b else parts | {"kd_dad": kd(z[b:], zt[b:], t) / 2}


# ---- files of trained networks -------------------------------------------------------------------

def write_tensors(path: Path, state: dict[str, Tensor], card: Card) -> None:
    """Writes tensors as .safetensors, with a Card and a hash of both, which read_weights checks."""
    state = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    meta = {"erpm": json.dumps(dataclasses.asdict(card))}
    meta["sha"] = sha(meta["erpm"], state)
    write_atomically(path, safetensors_bytes(state, meta))


def save(path: Path | str, module: nn.Module, **more) -> None:
    """Writes a network as .safetensors, for `load`, with its Card; more: fields of that to set."""
    module = module if hasattr(module, "card") else Net(module)
    module.card = dataclasses.replace(module.card, **more)
    write_tensors(Path(path), module.state_dict(), module.card)


def load(run: str | Path, net: nn.Module | None = None) -> nn.Module:
    """The Student, Team, Net or VQGAN that a run or `save` made, in eval mode.
    run: a run's folder (its model.safetensors) or a weights file.  net: your own network, where it
    was made from one: the Net, for its mean and std are in no file.  Raises: UserError."""
    path = Path(run) / "model.safetensors" if Path(run).is_dir() else Path(run)
    state, card = read_weights(path)
    if card is None or not card.name and net is None:
        raise UserError(f"{path} was not made by erpm.py from a network of its names: "
                        f"build(NAME, weights={str(path)!r}), or load({str(path)!r}, net=MODULE)")
    made, beside = card.made, path.parent / Path(card.clip).name
    if beside.is_file():  # also where the run was moved
        card = dataclasses.replace(card, clip=str(beside))
    if card.clip == "both towers":
        net = zero_shot(named(card.name, None, str(path), card.size_px), card.prompts)
        net.card = dataclasses.replace(card, clip=str(path))
        return freeze(net)
    if "vqgan" in made:
        net = VQGAN(made["vqgan"])
    elif net is None:
        net = named(card.name, card.n_classes, "random", card.size_px)
        if card.prompts:
            net.net.fc = TextHead(net.net.fc.weight.detach())
    net = net if hasattr(net, "card") else Net(net)
    if "prompted" in made:
        net = prompted(net, **made["prompted"])
    if "student" in made:
        net = Student(net, **made["student"])
    if "team" in made:
        net = Team(net, named(*made["team"]["teacher"]), made["team"]["tune"])
    load_strictly(net, state, f"{path} does not fit {card.name or 'the module'}")
    net.card = card
    return freeze(net)


def build(name: str | nn.Module, classes: int | Sequence[str] | None = None,
          weights: str | None = None, *, size_px: int = 0,
          templates: Sequence[str] = ("a photo of a {}.",)) -> nn.Module:
    """The network of that name, in eval mode.

    name: "timm:resnet50.tv_in1k", "torchvision:resnet50/IMAGENET1K_V1" (a tag loads its weights),
    "open_clip:ViT-B-32-quickgelu/openai", "cifar:resnet20-w2", "run:runs/x" (what that run made),
    or your own module, which is returned as it is.
    classes: number of outputs, which gets a new classifier where the weights have none; None = its
    own; or names, for a zero-shot network of open_clip.  size_px: side of the images that it is to
    see; 0 = its own.  weights: a local file instead of the tag's, of open_clip one of the whole
    CLIP; "random" = none.  templates: prompts with {} for the class.  Raises: UserError."""
    if isinstance(name, nn.Module):
        return name
    if name.startswith("run:"):
        return load(name[4:])
    if classes is None or isinstance(classes, int):
        return named(name, classes, weights, size_px)
    return zero_shot(named(name, None, weights, size_px), (tuple(classes), tuple(templates)))


# ==== 8. TRAINING ====
# In: a module, step(model, batch) -> (loss, {name: 0-d tensor}) and images.  Out: trained weights
# and log.jsonl.  Always: an interrupted run goes on to the same weights, on a CPU bit for bit.


class Batch(NamedTuple):
    """x uint8 (B,3,S,S), or a list of frozen features (B,...); y (B,); a CPU generator, a function
    of (seed, step, rank); and for each image a key of (seed, epoch, index)."""
    x: Tensor | list[Tensor]
    y: Tensor
    generator: torch.Generator
    keys: Sequence[tuple] = ()


def lr_at(step: int, total: int, warmup: float, peak: float) -> float:
    """Learning rate of a step: linear over `warmup` steps, then a cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(model: nn.Module, cfg: Train) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum; weight decay on matrices only."""
    from timm.optim import create_optimizer_v2
    opt = create_optimizer_v2(model, cfg.optimizer, cfg.lr, cfg.weight_decay, momentum=0.9)
    opt.param_groups.reverse()                           # matrices first
    return opt


def differences(old: dict, new: dict) -> str:
    """What differs between two mappings, as "a.b: 1 -> 2", or ""."""
    return ", ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted({*old, *new})
                     if old.get(k) != new.get(k))


def keep(path: Path, parts: dict, key: dict | None, *progress: float) -> None:
    """Writes a checkpoint, beside the one before it, on the first process; the others wait."""
    if world()[0] == 0:
        state = {"progress": progress, "key": json.dumps(key), "processes": world()[1]}
        state |= {name: part.state_dict() for name, part in parts.items()}
        torch.save(state, content := io.BytesIO())
        if path.is_file():
            os.replace(path, path.with_suffix(".ckpt1"))
        write_atomically(path, content.getvalue() + sha(content.getvalue()).encode())
    gathered()


def resume(path: Path, parts: dict, key: dict | None) -> tuple[int, float, int]:
    """(step, seconds, FLOPs of a step) of the checkpoint, or where it is damaged of the one before,
    whose states go back into the parts; else zeros.  Raises: UserError if it is another job's."""
    for file in filter(Path.is_file, (path, path.with_suffix(".ckpt1"))):
        content = file.read_bytes()
        if sha(content[:-16]).encode() != content[-16:]:
            say(f"{file} is damaged: it is left out")
            continue
        saved = torch.load(io.BytesIO(content[:-16]), map_location="cpu", weights_only=True)
        if other := differences(json.loads(saved["key"]), key):
            raise UserError(f"{file} is a half-done job with other settings ({other}): finish it "
                            "with those, delete it, or take another run=NAME")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        if saved["processes"] != world()[1]:
            say(f"{file}: made by {saved['processes']} processes: other draws from here on")
        return saved["progress"]
    return 0, 0.0, 0


def log_row(checkpoint: Path | None, row: dict, losses: list[dict[str, Tensor]]) -> str:
    """Appends the means to log.jsonl beside the checkpoint; what the terminal is told."""
    means = {k: round(float(sum(v[k] for v in losses)) / len(losses), 5) for k in losses[0]}
    if not all(map(math.isfinite, means.values())):
        raise UserError(f"{row['stage']}: the loss is not finite at step {row['step']} ({means}): "
                        "try a smaller learning rate or runtime.amp=none")
    if checkpoint and world()[0] == 0:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with open(checkpoint.with_name("log.jsonl"), "a") as f:
            f.write(json.dumps(row | means) + "\n")
    return f"loss {means['loss']:.4f}"


def feed(images: ImageSet, cfg: Train, seed: int, at: int, workers: int) -> Iterator[Batch]:
    """The micro-batches from step `at` on, on this process's device.  All that is random, dropout
    by the global generator too, is a function of the seed, the micro-batch and the rank."""
    device, n, size, start = pick_device(), len(images), cfg.batch // cfg.accum, at * cfg.accum
    order = itertools.islice(batches(n, size, seed), start, None)
    loaded = loader(images, workers, batch_sampler=order)
    send = operator.methodcaller("to", device, non_blocking=True)
    for i, (x, y, index) in enumerate(loaded, start):
        key, epoch = (seed, *divmod(i, cfg.accum), world()[0]), i // (n // size)
        torch.manual_seed(fold("dropout", *key))
        yield Batch(list(map(send, x)) if isinstance(x, list) else send(x), send(y),
                    rng("step", *key), [(seed, epoch, k) for k in index.tolist()])


def fit(model: nn.Module, step: Callable, images: ImageSet, cfg: Train, runtime: Runtime, *,
        name: str, seed: int, checkpoint: Path | None = None, key: dict | None = None,
        workers: int = 0) -> dict[str, float]:
    """Trains the module in place and returns {"images", "seconds", "gflops"}, of all steps.
    step(model, Batch) -> (loss, {name: 0-d tensor}) makes one forward through `model`, the module
    or its DDP wrapper.  checkpoint: where it goes on, of the job that key tells, log.jsonl beside
    it; None = no file.  Raises: UserError on a loss of NaN or inf; KeyboardInterrupt, all saved."""
    device, size, seed = pick_device(), world()[1], fold(seed, name)
    opt = make_optimizer(model.to(device).train(), cfg)
    scaler = torch.amp.GradScaler(enabled=amp_type(runtime.amp, device) == torch.float16)
    parts = {"model": model, "opt": opt, "scaler": scaler}
    if cfg.ema:
        parts["average"] = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema), use_buffers=True)
    at, seconds, flops = resume(checkpoint, parts, key) if checkpoint else (0, 0.0, 0)
    since, counter = time.perf_counter() - seconds, FlopCounterMode(display=False)
    data, per_epoch = feed(images, cfg, seed, at, workers), max(1, len(images) // cfg.batch)
    total, losses = max(1, round(cfg.epochs * per_epoch)), []
    wrapped = model if size == 1 else nn.parallel.DistributedDataParallel(model)
    trained = [p for group in opt.param_groups for p in group["params"]]
    say(f"{name}: {len(images):,} images, {total:,} steps of {cfg.batch}, "
        f"{sum(p.numel() for p in trained):,} trained parameters"
        + (f"; goes on at step {at:,}" if at else ""))
    with Progress(total * cfg.batch, name, at * cfg.batch) as bar:
        while at < total:
            lr = lr_at(at, total, cfg.warmup * per_epoch, cfg.lr)
            for group in opt.param_groups:
                group["lr"] = lr
            with contextlib.nullcontext() if at else counter:      # which rounds otherwise
                for micro, batch in enumerate(itertools.islice(data, cfg.accum), 1):
                    final = size == 1 or micro == cfg.accum  # processes average their sums once
                    with autocast(runtime.amp, device), \
                            contextlib.nullcontext() if final else wrapped.no_sync():
                        loss, found = step(wrapped, batch)
                    scaler.scale(loss / cfg.accum).backward()
                    losses.append({k: v.detach() for k, v in [("loss", loss), *found.items()]})
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(trained, cfg.clip or math.inf)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            if cfg.ema:
                parts["average"].update_parameters(model)
            at, flops = at + 1, flops or counter.get_total_flops()
            saves = at % runtime.save_every == 0
            if saves or at % runtime.log_every == 0 or at == total or size == 1 and bar.hit:
                row = {"stage": name, "step": at, "epoch": round(at / per_epoch, 3), "lr": lr}
                bar.set_postfix_str(log_row(checkpoint, row, losses), refresh=False)
                losses, stops = [], any(gathered(bar.hit)) and at < total
                if checkpoint and at < total and (stops or saves):
                    keep(checkpoint, parts, key, at, time.perf_counter() - since, flops)
                if stops:
                    raise KeyboardInterrupt(f"{name}, step {at} of {total}")
            bar.update(cfg.batch)
    if cfg.ema:
        model.load_state_dict(parts["average"].module.state_dict())
    model.eval()
    return {"images": total * cfg.batch, "seconds": round(time.perf_counter() - since, 2),
            "gflops": flops * size * total / 1e9}


# ---- the steps of the methods --------------------------------------------------------------------

def harden(x: Tensor, cfg: Robustify, generator: torch.Generator) -> Tensor:
    """x~: the images under the robust teacher's augmentation."""
    strength = (0.1, 0.3) if x.shape[-1] <= 64 else (0.375, 0.75)  # small detail drowns sooner
    return augment(x, cfg.augment, generator, augmix={"severity": cfg.severity},
                   pixmix={"pictures": cfg.pictures or None}, deepaugment={"strength": strength})


def frozen_views(backbone: nn.Module, aug: Robustify | None = None, clean: bool = True,
                 original: nn.Module | None = None, teacher: nn.Module | None = None) -> Callable:
    """see(batch) -> [features of x, of x~], and with teachers their logits, the original's on x and
    the robust one's on x~: all that a step takes and does not change."""
    @torch.no_grad()
    def see(batch: Batch) -> list[Tensor]:
        views = [batch.x] if clean else []
        if aug:
            views.append(harden(batch.x, aug, batch.generator))
        f = backbone(torch.cat(views)).chunk(len(views))
        return [*f, original(f[0]), teacher(views[1])] if teacher else list(f)
    return see


def plain_step(cfg: Train, see: Callable = frozen_views(nn.Identity())) -> Callable:
    """Cross-entropy on all that `see` gives of a batch, x and x~ alike: images, or features."""
    def step(model, batch):
        views = see(batch)
        z, y = model(torch.cat(views)).float(), torch.cat([batch.y] * len(views))
        return F.cross_entropy(z, y, label_smoothing=cfg.smoothing), {}
    return step


def robust_step(cfg: Robustify, n_classes: int) -> Callable:
    """[A] section 3.1: cross-entropy on x (where cfg.clean) and x~, or with cfg.jsd on x alone, and
    AugMix's consistency over three views; mixup and cutmix mix images and labels first."""
    plain = plain_step(cfg, frozen_views(nn.Identity(), cfg, cfg.clean))

    def step(model, batch):
        x, y = mix_labels(batch.x, batch.y, cfg.augment, batch.generator, n_classes)
        if not cfg.jsd:
            return plain(model, batch._replace(x=x, y=y))
        views = [x, *(harden(x, cfg, batch.generator) for _ in range(2))]
        z = model(torch.cat(views)).float().chunk(3)
        ce, consistency = F.cross_entropy(z[0], y, label_smoothing=cfg.smoothing), jsd(*z)
        return ce + cfg.jsd * consistency, {"ce": ce, "jsd": consistency}
    return step


def erpm_step(cfg: Distill, see: Callable) -> Callable:
    """METHOD [A]: one frozen pass of clean and augmented views, then the losses of eq. 3-5."""
    def step(model, batch):
        f, fa, z0, zt = see(batch)
        parts = erpm_loss(model(torch.cat([f, fa]), len(f)), z0, zt, batch.y, alpha=cfg.alpha,
                          t=cfg.temperature, smoothing=cfg.smoothing)
        return sum(parts.values()), parts
    return step


def attack(cfg: Robustify) -> dict:
    """The keywords of dad_samples."""
    return {k: getattr(cfg, k) for k in ("radius", "step", "steps", "start", "through")}


def dad_step(cfg: Robustify, teacher: nn.Module, vqgan: VQGAN | None, n_classes: int) -> Callable:
    """METHOD [B]: the student learns from the frozen teacher on x, under cfg.augment, and on x',
    samples that come beside x or are made here; without a VQGAN from x alone (kd)."""
    def step(model, batch):
        (x, *others), y = (v.contiguous() for v in batch.x.split(3, 1)), batch.y
        if vqgan is not None and not others:
            draws = [rng("dad", *key) for key in batch.keys]
            others = [_bytes(255 * dad_samples(x, y, teacher, vqgan, draws, **attack(cfg)))]
        x, y = mix_labels(x, y, cfg.augment, batch.generator, n_classes)
        views = torch.cat([harden(x, cfg, batch.generator), *others])
        parts = dad_loss(model(views), teacher(views), y, cfg.temperature, cfg.smoothing)
        return sum(parts.values()), parts
    return step


def vqgan_step(model, batch):
    """Reconstruction, codebook and commitment loss of a VQGAN (van den Oord et al. 2017).
    Half of the places skip the quantiser, so that the decoder asks for what no code tells yet (on
    shapes: colour); a code that nothing is nearest to moves to where the codes fit worst."""
    x = batch.x.float() / 255
    seen, z, q = model(x, free=0.5)
    parts = {"mse": F.mse_loss(seen, x) / x.var(), "codebook": F.mse_loss(q, z.detach()),
             "commitment": 0.25 * F.mse_loss(z, q.detach())}
    net = getattr(model, "module", model)
    codes = net.quantize.embedding.weight
    used = torch.zeros_like(codes[:, 0]).index_fill_(0, net.nearest(z).flatten(), 1)
    if world()[1] > 1:
        dist.all_reduce(used)
    places, gap = (v.detach().float().permute(0, 2, 3, 1).flatten(0, 2) for v in (z, z - q))
    worst = places[gap.square().sum(1).topk(min(len(places), len(codes))).indices]
    turn = (used == 0).cumsum(0) - 1                     # of a dead code, among the dead
    moves = ((used == 0) & (turn < len(worst)))[:, None]
    codes.data.copy_(torch.where(moves, worst[turn.clamp(0, len(worst) - 1)], codes.data))
    if world()[1] > 1:
        dist.broadcast(codes.data, 0)
    return sum(parts.values()), parts | {"codes used": (used > 0).float().mean()}


# ---- training from another project, without files ------------------------------------------------

@torch.no_grad()
def check_outputs(images: ImageSet, *nets: nn.Module) -> int:
    """The networks' number of outputs.  Raises: UserError unless all agree, with one a label."""
    x = images.__getitems__([(0, 0)])[0].to(pick_device())
    found = {net.to(x.device).eval()(x)[0].shape[-1] for net in nets}    # [0]: or the clean head's
    least, most = images.y.min(), images.y.max()
    if len(found) > 1 or not 0 <= least <= most < max(found):
        raise UserError(f"images: labels {least} to {most} for networks of "
                        f"{' and '.join(map(str, sorted(found)))} outputs")
    return max(found)


def robustify(net: nn.Module, images, *, seed: int = 0, crop: bool = True, flip: bool = True,
              **options) -> nn.Module:
    """The network, trained in place to be robust: cross-entropy on images and augmented images.
    images: what as_images takes.  net: of images in [0, 1].  crop, flip: as in Data.  options:
    fields of Robustify (augment, severity, jsd, epochs, batch, lr, ...).  Raises: UserError."""
    net = net if isinstance(net, Net) else Net(net)
    cfg = changed(Config(), {"robustify": options}, "erpm.robustify()").robustify
    images = as_images(images).subset(cfg.n_images).training(seed, crop, flip)
    fit(net.requires_grad_(True), robust_step(cfg, check_outputs(images, net)), images, cfg,
        Runtime(), name="robustify", seed=seed)
    return freeze(net)


def distill(student: Student, teacher: nn.Module, images, *, augment: str = "pixmix+augmix",
            severity: float = 3.0, seed: int = 0, crop: bool = True, flip: bool = True,
            **options) -> Student:
    """The Student, tuned in place by [A] eq. 5: its clean head by the original, robust by teacher.

    teacher: a robust network, images -> logits of the same classes.  images: as for robustify.
    options: fields of Distill (alpha, temperature, norms, epochs, lr, ...; tune, head and dropout
    are the Student's).  augment, severity: of x~.  crop, flip: as in Data.  Raises: UserError."""
    teacher = freeze(teacher if isinstance(teacher, Net) else Net(teacher)).to(pick_device())
    given = {"distill": options, "robustify": {"augment": augment, "severity": severity}}
    cfg = changed(Config(), given, "erpm.distill()")
    images = as_images(images).subset(cfg.distill.n_images).training(seed, crop, flip)
    check_outputs(images, student, teacher)
    student.tuned.norms = cfg.distill.norms
    see = frozen_views(student.backbone, cfg.robustify, True, student.original, teacher)
    fit(student.tuned.requires_grad_(True), erpm_step(cfg.distill, see),
        images, cfg.distill, Runtime(), name="distill", seed=seed)
    return student.eval()


# ==== 9. EVALUATION ====
# In: networks, a set.  Out: facts about every image, and of these a row a cell (network, set,
# corruption, severity).  Always: any number of processes gives the same figures.


@torch.no_grad()
def over(images: ImageSet, f: Callable, *, batch: int = 256, workers: int = 0,
         bar: Progress | None = None) -> dict:
    """{name: float32 (n, ...)} of f(x, y, index) -> {name: tensor (B, ...)}, in the set's order on
    every process; a batch is one process's and holds the same images for any number of them."""
    (rank, size), device, n, mine = world(), pick_device(), len(images), []
    lists = [[(0, p) for p in range(s, min(s + batch, n))] for s in range(0, n, batch)][rank::size]
    for keys, (x, y, index) in zip(lists, loader(images, workers, batch_sampler=lists)):
        found = f(x.to(device, non_blocking=True), y.to(device, non_blocking=True), index)
        mine.append({k: v.float().cpu().numpy() for k, v in found.items()})
        if bar is not None:
            bar.update(len(keys) * n // sum(map(len, lists)))                # of all processes
    turns = itertools.zip_longest(*gathered(mine))           # batches as they were dealt
    parts = [v for turn in turns for v in turn if v]
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def facts(log_p: Tensor, y: Tensor) -> Tensor:
    """(B,4) of log probabilities (B,C): right, label among the first five, NLL in nats, confidence.
    Of equal ones the first class is before, as in argmax; topk breaks ties otherwise."""
    own = log_p.gather(-1, y[:, None])
    before = torch.arange(log_p.shape[-1], device=y.device) < y[:, None]
    rank = ((log_p > own) | (log_p == own) & before).sum(-1)
    return torch.stack([rank == 0, rank < 5, -own[:, 0], log_p.amax(-1).exp()], 1)


def figures_of(v: np.ndarray, label: str) -> dict:
    """{"correct", "correct5", "nll", "ece"} of facts (n,4), and of (n,5) "heads".  ECE: 15 bins of
    confidence, (lo, hi], Guo et al. 2017.  Raises: UserError on outputs of NaN or inf."""
    if bad := int((~np.isfinite(v)).any(1).sum()):
        raise UserError(f"{label or 'the network'}: its outputs are not finite (NaN or inf) for "
                        f"{bad} of {len(v)} images; try runtime.amp=none")
    at = np.searchsorted(torch.linspace(0, 1, 16)[1:-1].numpy(), v[:, 3])
    right, top5, nll, confidence, *head = v.astype(np.float64).T
    gap = np.bincount(at, right - confidence, 15)
    found = {"correct": int(right.sum()), "correct5": int(top5.sum()),
             "nll": round(nll.mean(), 6), "ece": round(np.abs(gap).sum() / len(v), 6)}
    if head:
        found["heads"] = np.bincount(head[0].astype(int), minlength=3).tolist()
    return found


def facts_of(model: Callable, x: Tensor, y: Tensor, ids: Tensor | None, passes: int,
             ask: Callable) -> dict[str, Tensor]:
    """{rule: facts and the head that answered (B,5)} of a Student, {"": facts} of others."""
    if not isinstance(model, Student):
        z = model(x, ask) if isinstance(model, Team) else ask(model, x)
        return {"": facts(project(z, ids).float().log_softmax(-1), y)}
    f, out = model.backbone(x), {}
    drawn = model.moments(f, passes, ids)
    ways = {rule: (rule, drawn) for rule in RULES}
    ways |= {f"product ({told})": ("product", model.moments(f, t, ids))
             for t, told in ((0, "closed form"), (3, "3 passes")) if t < passes}
    for name, (rule, (mean, sigma, logits)) in ways.items():
        head = select(mean, sigma, rule, logits=logits, y=y)
        p = answer(mean, sigma, head, rule).clamp_min(torch.finfo(torch.float32).tiny)
        out[name] = torch.cat([facts(p.log(), y), head[:, None]], 1)
    return out


def evaluate_all(models: dict[str, Callable], images: ImageSet, cell: tuple[str, int] | None = None,
                 *, passes: int = 10, amp: str = "auto", **options) -> dict[str, dict]:
    """{label: figures} of several networks on the same pixels; see `evaluate`."""
    def f(x, y, index):
        if cell:
            x = corrupt(x, *cell, index=index.tolist(), jpeg=True)
        out, ask = {}, functools.cache(operator.call)    # a member of teams runs once a batch
        with autocast(amp, x.device):
            for label, m in models.items():
                found = facts_of(m, x, y, images.ids, passes, ask)
                out |= {(label, rule): v for rule, v in found.items()}
        return out

    rows = {label: {"n": len(images)} for label in models}
    for (label, rule), v in over(images, f, **options).items():
        place = rows[label].setdefault("rules", {}).setdefault(rule, {}) if rule else rows[label]
        place |= figures_of(v, label)
    return rows


def aligned(images: ImageSet, card: Card) -> ImageSet:
    """The set with its classes looked up in outputs that are the same in another order."""
    if images.corrupted == "read" and images.base == card.home:   # CIFAR's arrays name no classes
        return dataclasses.replace(images, outputs=card.classes)
    if images.outputs == card.classes or set(images.outputs) != set(card.classes):
        return images
    ids = torch.tensor([[card.classes.index(c)] for c in images.classes])
    return dataclasses.replace(images, ids=ids, outputs=card.classes)


def evaluate(predict: Callable, images, cell: tuple[str, int] | None = None, **options) -> dict:
    """Figures of a network on a set: {"n", "correct", "correct5" (counts), "nll" (nats), "ece" (15
    bins)}; of a Student {"n", "rules": {rule: these and "heads", how often each answered}}.

    predict: any function from images uint8 (B,3,H,W) to logits; a module is put in eval mode, on
    the accelerator.  images: what as_images takes (files in the set's view), or the name of a set
    in ./data (in the network's).  cell: (corruption, severity), made on the fly, with the published
    JPEG round trip.  options: batch, passes, amp, workers.  Raises: UserError, also on NaN."""
    card = getattr(predict, "card", Card())
    if isinstance(images, str) and set_row(images)[1]:
        raise UserError(f"{images}: name the clean set, and the corruption by cell=(NAME, 1 to 5)")
    images = open_set(images, view=card.view) if isinstance(images, str) else as_images(images)
    if isinstance(predict, nn.Module):
        predict.eval().to(pick_device())
    return evaluate_all({"": predict}, aligned(images, card), cell, **options)[""]


# ---- linear probes -------------------------------------------------------------------------------

PROBE_L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


def _fit_softmax(fc: nn.Linear, x: Tensor, y: Tensor, l2: float) -> None:
    """Moves fc to the least mean cross-entropy + l2/2 |W|^2; in chunks, no (n,C) is held."""
    rows = max(1, 2 ** 24 // fc.out_features)
    opt = torch.optim.LBFGS(fc.parameters(), max_iter=500, tolerance_grad=1e-7,
                            tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        opt.zero_grad()
        total = l2 / 2 * fc.weight.square().sum()
        total.backward()
        for xs, ys in zip(x.split(rows), y.split(rows)):
            part = F.cross_entropy(fc(xs), ys, reduction="sum") / len(y)
            part.backward()
            total = total.detach() + part.detach()
        return total

    opt.step(closure)


@torch.no_grad()
def linear_probe(features: Tensor, y: Tensor, n_classes: int, seed: int = 0) \
        -> tuple[nn.Linear, float]:
    """(layer, chosen l2): a multinomial logistic regression on frozen features.
    The least mean cross-entropy + l2/2 |W|^2 on standardised features (folded into the layer), in
    float64 on a CPU.  l2: of PROBE_L2, by the loss on a tenth.  Shapes: features (n,D), y (n,)."""
    device = pick_device()
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    var, mean = torch.var_mean(features, 0, correction=0)
    std = torch.where(var > 1e-12, var, 1.0).sqrt()
    order = torch.from_numpy(np.random.default_rng(fold("probe", seed)).permutation(len(y)))
    x, y = ((features - mean) / std)[order].to(device, dtype), y[order].to(device)
    fc = nn.Linear(x.shape[1], n_classes, device=device, dtype=dtype)
    fc.weight.zero_()
    fc.bias.zero_()
    n, best = len(y) - len(y) // 10, (math.inf, PROBE_L2[0])
    for l2 in PROBE_L2:                  # from strong to weak, warm starts
        _fit_softmax(fc, x[:n], y[:n], l2)
        best = min(best, (float(F.cross_entropy(fc(x[n:]), y[n:])), l2))
    _fit_softmax(fc, x, y, best[1])
    fc.weight /= std.to(fc.weight)
    fc.bias -= fc.weight @ mean.to(fc.weight)
    return fc.float().cpu(), best[1]


def weights_sha(net: nn.Module) -> str:
    """A hash of the network's tensors, and of its prompts in the place of their embeddings."""
    texts = {f"{n}.weight" for n, m in net.named_modules(remove_duplicate=False)
             if isinstance(m, TextHead)}
    prompts = getattr(net, "card", Card()).prompts
    return sha({k: v for k, v in net.state_dict().items() if k not in texts}, repr(prompts))


def frozen_features(model: nn.Module) -> nn.Module:
    """What stands before the last linear layer, the clean head's of a Student: images -> (B,D)."""
    if isinstance(model, Net) and not model.card.n_classes:        # an encoder
        return freeze(model)
    if isinstance(model, Student):
        *body, last = model.backbone, *model.tuned.shared, *model.tuned.heads["clean"]
    else:
        *body, last = stages(model)
    return freeze(nn.Sequential(*body, last.features))


def fit_probe(model: nn.Module, images: ImageSet, cfg: Config) -> nn.Sequential:
    """The network's frozen features and a new linear layer, fitted to the images of the set; the
    layer is kept in the run, under a hash of what it depends on."""
    features, pixels, card = frozen_features(model), images.images, model.card
    pixels = pixels if isinstance(pixels, Tensor) else "\n".join(map(str, pixels))
    key = sha(pixels, images.y, images.index, weights_sha(model), versions()["erpm"], repr((
        images.view, images.classes, cfg.seed, cfg.runtime.amp, card.name, card.size_px)))
    file = cfg.dir / f"probes/{key}.safetensors"
    if not any(gathered(file.is_file())):
        bar = Progress(len(images), "linear probe: features")  # outside its context: stops at once
        with autocast(cfg.runtime.amp, pick_device()):
            x = over(images, lambda x, y, index: {"f": features(x)}, batch=cfg.eval.batch,
                     workers=cfg.data.workers, bar=bar)["f"]
        fc, l2 = linear_probe(torch.from_numpy(x), torch.from_numpy(images.y[images.index]),
                              len(images.classes), seed=cfg.seed)
        say(f"linear probe on {len(images):,} images of {images.name}: l2 = {l2:g}")
        if world()[0] == 0:
            write_tensors(file, fc.state_dict(), Card())
        gathered()
    state = read_weights(file)[0]                        # equal on all processes
    fc = nn.Linear(*state["weight"].shape[::-1])
    fc.load_state_dict(state)
    probe = nn.Sequential(features, Classifier(nn.Identity(), fc))
    probe.card = card
    return freeze(probe.to(pick_device()))


@torch.no_grad()
def gflops(model: nn.Module, size_px: int, passes: int = 0) -> float:
    """GFLOPs of an answer to an image, by torch's counter (2 a multiply-add; matrix products and
    convolutions alone).  passes: as in Student.predict."""
    bare = {id(t): t.to("meta") for t in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, bare)                   # no weights are copied: shapes count
    x = torch.zeros(1, 3, size_px, size_px, device="meta")
    with FlopCounterMode(display=False) as counter:
        if isinstance(model, Student):
            model.moments(model.backbone(x), passes)
        else:
            model(x)
    return round(counter.get_total_flops() / 1e9, 6)


def kind_of(card: Card, images: ImageSet) -> str:
    """What a set is to a network: "home" = trained on, or a part of it (ImageNet for public ones),
    "shift" = the same classes otherwise, "transfer" = other classes."""
    home = card.home or "imagenet"
    at_home = images.base == home or images.base.startswith(f"{home}@")
    if at_home and not images.corrupted:
        return "home"
    return "shift" if at_home or images.outputs == (card.classes or synsets()) else "transfer"


def headed(label: str, model: nn.Module, name: str, images: ImageSet, cfg: Config) \
        -> tuple[str, nn.Module]:
    """(label, network) that answers on a set: by its own head where its outputs are these classes,
    by prompts where it has a text tower, else by a linear probe.  Raises: UserError."""
    card, how, row = model.card, cfg.eval.head, SETS.get(images.base)
    own, n = card.classes == images.outputs, len(images.outputs)
    a_clip = card.prompts or card.name.startswith("open_clip:") and not card.n_classes
    if how == "auto" and a_clip:
        prompts = prompts_of(images, cfg.model.templates, cfg.data.names)
        return label if own else f"{label}, zero-shot", zero_shot(model, prompts)
    if how == "own" or how == "auto" and own:
        if card.n_classes != n:
            raise UserError(f"{label} has {card.n_classes} classes and {name} needs {n}")
        return label, model
    home = images.base.removesuffix("-r") if row else name.replace("folder-c:", "folder:")
    home = "imagenet" if row and row.part is not None else home
    probes = model.__dict__.setdefault("probes", {})     # one serves many sets
    if home not in probes:
        try:
            probes[home] = fit_probe(model, open_set(home, cfg.data, "train", card.view), cfg)
        except (UserError, OSError) as e:
            raise UserError(f"{label}: its classes are not those of {name}, and a linear probe "
                            f"cannot be had: {e}") from None
    return f"{label}, linear probe", probes[home]


def identity(label: str, model: nn.Module, images: ImageSet, cfg: Config) -> dict:
    """The columns of a row that are known before it is computed; "of" is a hash of everything that
    makes it another evaluation, corruption and severity apart."""
    card, ev, transform = model.card, cfg.eval, str(images.view)
    if images.corrupted == "made":
        textures = "original" if frost_folder() else "procedural"
        transform += f", corrupted on the fly, jpeg 85, {textures} frost"
    if card.size_px not in (0, images.view.size_px):
        transform += f", network {card.size_px} px"
    drawn = (cfg.data.n_test, ev.n_cell) if images.corrupted == "made" else ()
    row = {"label": label, "seed": cfg.seed, "set": images.name, "n": len(images),
           "transform": transform, "amp": str(amp_type(cfg.runtime.amp, pick_device())),
           "passes": ev.passes if isinstance(model, Student) else None}
    of = sha(repr((row, drawn, card.name)), weights_sha(model), versions()["erpm"])
    return row | {"of": of, "kind": kind_of(card, images), "train": card.train,
                  "gflops": gflops(model, images.view.size_px, ev.passes)}


def read_rows(run: Path) -> list[dict]:
    """The rows of a run's results.jsonl whose hash is right."""
    path, rows = run / "results.jsonl", []
    for n, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        text, _, end = line.rpartition(b', "sum": "')
        if end == sha(text).encode() + b'"}':
            rows.append(json.loads(text + b"}"))
        else:
            say(f"{path}: row {n} is damaged: eval makes it again")
    return rows


def score(models: dict[str, nn.Module], images: ImageSet, cfg: Config) -> set[str]:
    """Adds to the run's results.jsonl what is missing of the set, a row a network and cell, as soon
    as it is known.  Returns the "of" of what was asked.  Raises: KeyboardInterrupt."""
    ev, made = cfg.eval, images.corrupted == "made"
    n_cell = ev.n_cell if made else 0
    few = images.subset(n_cell)
    rows = {label: identity(label, m, few, cfg) for label, m in models.items()}
    kept, lines, jobs = read_rows(cfg.dir), [], {}
    done = gathered({(r["of"], r["corruption"], r["severity"]) for r in kept})[0]
    for cell in CELLS if images.corrupted else [("", 0)]:
        jobs[cell] = {x: m for x, m in models.items() if (rows[x]["of"], *cell) not in done}
    jobs = {cell: pending for cell, pending in jobs.items() if pending}
    with Progress(len(jobs) * len(few), f"eval: {images.name}") as bar:
        for cell, pending in jobs.items():
            since, some = time.perf_counter(), images.subset(n_cell, *cell)
            if images.corrupted == "read":
                some = open_set(f"{images.base}-c", cfg.data, cell=cell)
            try:
                found = evaluate_all(pending, some, cell if made else None, passes=ev.passes,
                                     amp=cfg.runtime.amp, batch=ev.batch,
                                     workers=cfg.data.workers, bar=bar)
            except UserError as e:                       # of pictures all are told at once
                if "cannot read the image" not in str(e):
                    raise
                bad = list(filter(None, map(unreadable, some.images)))
                raise UserError(f"{len(bad)} pictures of {images.name} cannot be read: mend or "
                                f"remove {', '.join(bad)}") from None
            where = {"corruption": cell[0], "severity": cell[1], "processes": world()[1],
                     "seconds": round(time.perf_counter() - since, 3),
                     "device": pick_device().type, "packages": versions()}
            kept += [rows[label] | where | figures for label, figures in found.items()]
            if world()[0] == 0:
                texts = [json.dumps(row)[:-1] for row in kept[len(lines):]]
                lines += [f'{text}, "sum": "{sha(text)}"}}\n' for text in texts]
                write_atomically(cfg.dir / "results.jsonl", "".join(lines))
            if any(gathered(bar.hit)):
                raise KeyboardInterrupt(f"eval, after {images.name} {cell[0]} {cell[1]}")
    return {row["of"] for row in rows.values()}


# ==== 10. REPORT ====
# In: rows of results.jsonl.  Out: Markdown and figures.  Always: a pure function of the rows (the
# pictures alone look at images); what is missing is called missing, never a smaller mean.

KNOWN_ON = "imagenet imagenet-c imagenet-v2 imagenet-a imagenet-r imagenet-sketch objectnet".split()
ALEXNET = dict(zip(CORRUPTIONS, (       # its errors, means of 5 severities (Hendrycks 2019)
    0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572,
    0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500)))
KNOWN = {                       # published, in percent: top-1 on KNOWN_ON, on imagenet-c the mCE
    "timm:resnet50.tv_in1k": (76.13, 76.7, 63.21, 0.00, 36.17, 24.09, 35.75),
    "timm:resnet101.tv_in1k": (77.37, math.nan, 65.45, 4.72, 39.31, 26.97, 38.38),
    "ResNet-50, DeepAugment+AugMix": (75.82, 53.6, 63.54, 3.88, 46.77, 32.62, 35.15),
    "ResNet-50, AugMix": (math.nan, 65.3, math.nan, math.nan, math.nan, math.nan, math.nan),
    "CLIP ViT-B/32, zero-shot": (63.30, math.nan, 55.77, 31.39, 69.26, 42.37, 43.96)}
# name: (a row of `latest` -> what stands in a table, its format)
MEASURES: dict[str, tuple[Callable[[dict], float], str]] = {
    "top-1": (lambda r: 100 * r["correct"] / r["n"], ".2f"),
    "top-5": (lambda r: 100 * r["correct5"] / r["n"], ".2f"),
    "NLL": (lambda r: r["nll"], ".3f"),
    "ECE": (lambda r: 100 * r["ece"], ".2f"),
    # all severities weigh alike, so the mean over the cells is the mCE
    "mCE": (lambda r: 100 * (1 - r["correct"] / r["n"]) / ALEXNET[r["corruption"]], ".2f"),
    "F": (lambda r: 100 * r["heads"][2 * (r["kind"] == "shift")] / r["n"], ".2f"),
    "images/s": (lambda r: r["n"] / r["seconds"], ".0f"),
    "training, s": (lambda r: r["train"]["seconds"], ".0f"),
    "ms / training image": (lambda r: 1000 * r["train"]["seconds"] / r["train"]["images"], ".2f"),
    "time / FT": (lambda r: r["train"]["seconds"] / r["FT"]["train"]["seconds"], ".2f"),
    "training FLOPs / FT": (lambda r: r["train"]["gflops"] / r["FT"]["train"]["gflops"], ".2f"),
    "GFLOPs": (lambda r: r["gflops"], ".4g"),
    "GFLOPs / original": (lambda r: r["gflops"] / r["original"]["gflops"], ".2f")}
COSTS = "ms / training image", "time / FT", "training FLOPs / FT", "GFLOPs", "GFLOPs / original"


def latest(rows: list[dict]) -> list[dict]:
    """One row a cell: of each (label, seed, set) those of the evaluation with the most images, of
    equal ones the newest; two never mix.  Each has the figures of its rule, and FT's and the
    original's rows of its seed.  Raises: UserError where two runs hold the same label and seed."""
    place, runs = operator.itemgetter("label", "seed", "set"), {}
    for r in rows:
        other = runs.setdefault((r["label"], r["seed"]), r["run"])
        if other != r["run"]:
            raise UserError(f"{other} and {r['run']} both hold {r['label']} of seed {r['seed']}: a "
                            "report averages over seeds; give it runs that differ in nothing else")
    last = {place(r): r["of"] for r in sorted(rows, key=operator.itemgetter("n"))}
    kept = {(*place(r), r["corruption"], r["severity"]): r
            for r in rows if r["of"] == last[place(r)]}.values()
    beside = {(r["label"], r["seed"]): r for r in kept}
    return [r | r.get("rules", {}).get(r["rule"], {})
            | {x: beside.get((x, r["seed"]), {}) for x in ("FT", "original")} for r in kept]


def by_kind(rows: list[dict]) -> list[list[str]]:
    """The sets of home, shift and transfer, as scored; home (which comes last) wins."""
    kinds = {r["set"]: r["kind"] for r in sorted(rows, key=lambda r: r["kind"], reverse=True)}
    return [[s for s in kinds if kinds[s] == kind] for kind in ("home", "shift", "transfer")]


def seed_means(rows: list[dict], *, label: str, sets: Sequence[str], rule: str = "",
               measure: str = "top-1", **where) -> np.ndarray:
    """A measure of a model, a number a seed: the mean over sets of the mean over a set's cells.
    Empty when a cell is missing for a seed, NaN where a row lacks what the measure looks for.
    rule: of a Student, by default the row's own.  where: columns of the rows that count."""
    own = [r for r in rows if r["label"] == label]
    wide = {r["set"] for r in own if r["corruption"]}
    cells = 1 if "corruption" in where else len(CORRUPTIONS)
    cells *= 1 if "severity" in where else 5
    found = {(r["seed"], s): [] for r in own for s in sets}
    for r in own:
        if r["set"] in sets and all(r[k] == v for k, v in where.items()):
            value = math.nan
            with contextlib.suppress(KeyError):
                r = r | r["rules"][rule] if rule else r
                value = r[measure] if measure in r else MEASURES[measure][0](r)
            found[r["seed"], r["set"]].append(value)
    if any(len(v) < (cells if s in wide else 1) for (_, s), v in found.items()):
        return np.empty(0)
    return np.reshape([np.mean(v) for v in found.values()], (-1, len(sets))).mean(1)


def markdown(head: Sequence, body: Sequence[Sequence]) -> str:
    """A Markdown table, columns aligned."""
    table = [[str(c) for c in line] for line in (head, *body)]
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |"
                     for line in table)


def pivot(rows: list[dict], title: str, lines: dict[str, dict], columns: dict[str, dict],
          note: str = "") -> str:
    """A titled Markdown table, "" without lines or columns: mean ± deviation of the seed_means by
    the keywords of column and line (which wins), "missing", or "-" where they are NaN."""
    if not lines or not columns:
        return ""
    body = []
    for heading, line in lines.items():
        body.append([heading])
        for column in columns.values():
            what = {"measure": "top-1"} | column | line
            values, form = seed_means(rows, **what), MEASURES[what["measure"]][1]
            text = f"{values.mean():{form}}" if len(values) else "missing"
            spread = f" ± {values.std(ddof=1):{form}}" if len(values) > 1 else ""
            body[-1].append("-" if np.isnan(values).any() else text + spread)
    parts = [f"## {title}", note, markdown(["", *columns], body)]
    return "\n\n".join(filter(None, parts))


def models(rows: list[dict], scored: Sequence[str]) -> dict[str, dict]:
    """Lines or columns of a pivot: the models that were scored on some of the sets."""
    return {r["label"]: {"label": r["label"]} for r in rows if r["set"] in scored}


def main_tables(rows: list[dict], plan: dict[str, list[str]]) -> list[str]:
    """[A] Tables 1 to 4, those of the plan, {"title; note": models}, and Tables 6 and 7."""
    home, shifts, transfer = by_kind(rows)
    places = {s: {"sets": [s]} for s in home}
    if len(shifts) > 1:
        places[f"mean of {len(shifts)} shifts"] = {"sets": shifts}
    places |= {s: {"sets": [s]} for s in shifts}
    columns = places | {s.replace("imagenet-c", "mCE"): {"sets": [s], "measure": "mCE"}
                        for s in shifts if s.startswith("imagenet-c")}
    columns |= {m: {"sets": (home + shifts + transfer)[:1], "measure": m} for m in COSTS}
    scored = {s.partition(" (")[0]: s for s in home + shifts}           # without its qualification
    known = [{"label": f"{label} (published)", "seed": 0, "set": scored[s], "corruption": "",
              "severity": 0, "mCE" if s == "imagenet-c" else "top-1": percent}
             for label, row in KNOWN.items() for s, percent in zip(KNOWN_ON, row) if s in scored]
    note = "(published) = of whole sets from disk" if known else ""
    tables = [pivot(known + rows, "Models", models(known + rows, home + shifts), columns, note)]
    free = {"original", "teacher", "original + teacher"} & models(rows, home + shifts).keys()
    for title, labels in plan.items():
        title, _, note = title.partition(";")
        lines = {x: {"label": x} for x in (*sorted(free), *labels)}
        tables.append(pivot(rows, title, lines, columns, note.strip()))
    others = {s: {"sets": [s]} for s in transfer}
    tables.append(pivot(rows, "Transfer", models(rows, transfer), others))
    places |= {f"F {place}": column | {"measure": "F"} for place, column in places.items()}
    for label, rules in {r["label"]: r["rules"] for r in rows if "rules" in r}.items():
        lines = {rule: {"label": label, "rule": rule} for rule in rules}
        tables.append(pivot(rows, f"{label}: which rule picks the head", lines, places, "F = share "
                            "of images sent to the right head: clean at home, robust under shift; "
                            "oracle = either head right."))
    return tables


def summary(rows: list[dict]) -> str:
    """The figures of every network on every set, of rows of `latest`."""
    lines = {f"{r['label']} on {r['set']}": {"label": r["label"], "sets": [r["set"]]}
             for r in rows}
    columns = {m: {"measure": m} for m in ("top-1", "top-5", "NLL", "ECE", "images/s")}
    return pivot(rows, "Every model on every set", lines, columns,
                 "NLL in nats; ECE in percent, 15 bins; means over the cells of a -c set.")


def report_text(rows: list[dict], plan: dict[str, list[str]] = {}) -> str:
    """The whole report in Markdown; plan: the tables of compare.rows."""
    rows = latest(rows)
    seeds = len({r["seed"] for r in rows})
    parts = [f"# {', '.join(by_kind(rows)[0]) or 'Results'}",
             "Top-1 accuracy in percent; mean over the cells of a -c set; mean ± standard "
             f"deviation over the seeds ({seeds}).", *main_tables(rows, plan)]
    for name in dict.fromkeys(r["set"] for r in rows if r["corruption"]):
        lines = {c: {"corruption": c, "sets": [name]} for c in CORRUPTIONS}
        lines |= {f"severity {k}": {"severity": k, "sets": [name]} for k in range(1, 6)}
        title = f"{name} by corruption and by severity"
        parts.append(pivot(rows, title, lines, models(rows, [name])))
    ways = dict.fromkeys(f"- {r['set']}: {'75 cells of ' if r['corruption'] else ''}{r['n']:,} "
                         f"images, {r['transform']}" for r in rows)
    parts += [summary(rows), "\n".join(["## Sets\n", *ways])]
    return "\n\n".join(filter(None, parts)) + "\n"


def drawing(panels: dict[str, dict[str, list]], xlabel: str, ylabel: str):
    """A matplotlib figure of panels side by side, {title: {model: [(x, values of the seeds)]}};
    bars = spread over the seeds, hollow = with the teacher beside it."""
    from matplotlib.figure import Figure
    labels = list(dict.fromkeys(x for panel in panels.values() for x in panel))
    size = 5 + 4.4 * len(panels), max(4.2, 0.22 * len(labels) + 0.3)
    fig, legend = Figure(size, dpi=150, layout="constrained"), {}
    axes = fig.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (title, panel) in zip(axes, panels.items()):
        ax.grid(axis="y", color="#E5E5E5")
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        for label, points in panel.items():
            k, (x, y) = labels.index(label), zip(*points)
            y = [v if len(v) else np.array([math.nan]) for v in y]
            spread = [v.std(ddof=len(v) > 1) for v in y]
            legend[label] = ax.errorbar(
                x, [v.mean() for v in y], spread, color=f"C{k}", marker="os^Dv<>PX*ph"[k % 12],
                fillstyle="none" if label.endswith("+ teacher") else "full")
    fig.legend(legend.values(), legend, loc="outside right center", frameon=False)
    return fig


def figures(rows: list[dict]) -> dict:
    """{file name: matplotlib figure}: [A] Fig. 3, a panel a -c set, and Fig. 1 with the Pareto
    front, where a model not trained here costs 0.  Raises: ImportError without matplotlib."""
    rows, panels, points, drawn = latest(rows), {}, {}, {}
    shifts = by_kind(rows)[1]
    clean = {corrupted_name(r["set"].partition(" (")[0]): r["set"] for r in rows}
    for name in dict.fromkeys(r["set"] for r in rows if r["corruption"]):
        at = [{"sets": [clean.get(name.partition(" (")[0], "")]}]
        at += [{"sets": [name], "severity": k} for k in range(1, 6)]
        panels[name] = panel = {}
        for x in models(rows, [name]):
            panel[x] = [(k, seed_means(rows, label=x, **what)) for k, what in enumerate(at)]
    if panels:
        drawn["severity.png"] = drawing(panels, "severity (0 = clean)", "top-1 accuracy, %")
    if any(r["set"] in shifts and r["train"] for r in rows):
        for x in models(rows, shifts):
            gain = seed_means(rows, label=x, sets=shifts)
            cost = seed_means(rows, label=x, sets=shifts, measure="training, s")
            if len(gain):
                points[x] = [(np.nan_to_num(cost).mean() / 60, gain)]
        fig = drawn["pareto.png"] = drawing(
            {"dotted: Pareto front": points}, "training of the model's own stage, minutes",
            "top-1 accuracy, %, mean over the shifts")
        found = sorted((cost, -gain.mean()) for [(cost, gain)] in points.values())
        cost, loss = np.reshape(found, (-1, 2)).T
        fig.axes[0].step(cost, -np.minimum.accumulate(loss), "k:", where="post", zorder=1)
    return drawn


# ==== 11. BENCH ====
# In: nothing.  Out: rows of ours against what a user would pick instead: the same images, threads
# and settings, in turns within one run, so that a busy machine slows both alike.


def paired(ours: Callable, theirs: Callable | None, n: int, n_theirs: int, rounds: int = 5) -> dict:
    """{"ours", "theirs", "ratio", "spread"}: median images/s and ratio over the rounds, and the
    least and largest ratio; "ours" alone where there is no such package."""
    sides = [(ours, n), (theirs, n_theirs)] if theirs else [(ours, n)]
    rates = np.zeros((rounds + 1, len(sides)))
    for i, j in np.ndindex(rates.shape):
        start = time.perf_counter()
        sides[j][0]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        rates[i, j] = sides[j][1] / (time.perf_counter() - start)
    rates = rates[1:]                    # the first round warms up
    row = dict(zip(("ours", "theirs"), np.median(rates, 0).round(1).tolist()))
    if theirs:
        ratios = np.sort(rates[:, 0] / rates[:, 1]).round(2)
        row |= {"ratio": np.median(ratios).item(), "spread": ratios[[0, -1]].tolist()}
    return row


def bench_images(size: int = 224, n: int = 64, severity: int = 3) -> Iterator[dict]:
    """Every corruption against PyPI's imagecorruptions, where that runs; AugMix against v2's."""
    x = make_shapes(n, size, "test")[0].to(pick_device())
    pictures = [np.ascontiguousarray(i) for i in x[:8].permute(0, 2, 3, 1).cpu().numpy()]
    parts = {name: [name] for name in CORRUPTIONS} | {
        "the 15": CORRUPTIONS,
        "the 14 without glass_blur": [c for c in CORRUPTIONS if c != "glass_blur"]}
    for part, names in parts.items():
        few = pictures[:1] if "glass_blur" in names else pictures    # a Python loop over the pixels
        theirs = lambda: [other(p, severity, c) for c in names for p in few]
        try:
            from imagecorruptions import corrupt as other
            theirs()
        except Exception:                # it is old, and breaks with newer NumPy and skimage
            theirs = None
        row = paired(lambda: [corrupt(x, c, severity) for c in names], theirs, n, len(few), 3)
        yield {"part": part, "against": "imagecorruptions", **row}
    mix = v2.AugMix(severity, all_ops=False)
    row = paired(lambda: augmix(x, rng(0), severity), lambda: [mix(i) for i in x.cpu()], n, n)
    yield {"part": "augmix", "against": "torchvision v2", **row}


def bench_loader(n: int = 64) -> Iterator[dict]:
    """JPEG files of ImageNet's size to a batch of random crops, against torchvision's own way."""
    fields = _bytes(255 * plasma([rng("bench", i) for i in range(3 * n)], 500, 1.1)[:, :375])
    with tempfile.TemporaryDirectory() as top:
        Path(top, "class").mkdir()
        for i, picture in enumerate(fields.unflatten(0, (n, 3))):
            v2.functional.to_pil_image(picture).save(f"{top}/class/{i}.jpg", quality=90)
        images = ImageSet("bench", [0] * n, ["class"], images=pictures_below(top)).training(0)
        theirs = torchvision.datasets.ImageFolder(top, v2.Compose([
            v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()]))
        row = paired(lambda: next(iter(loader(images, 0, batch_sampler=batches(n, n, 0)))),
                     lambda: next(iter(torch.utils.data.DataLoader(theirs, n, True))), n, n)
    yield {"part": "loader", "against": "ImageFolder and v2", **row}


def training_steps(student: str, teacher: str, x: Tensor) -> dict[str, Callable]:
    """{method: a step of training} of timm's networks on images (n,3,224,224), not augmented: FT,
    ERPM with the last stage in each head, live, from a cache, and without sharing: whole copies."""
    net, other = (freeze(named(f"timm:{name}", 1000, "random")) for name in (student, teacher))
    parts, aug, cfg = stages(net), Robustify(augment="none"), Distill()
    apart = ThreeHeads(parts, len(parts) - 1, cfg.dropout, "head")
    for head in apart.heads.values():
        head[:-2].requires_grad_(False)
    tuned, apart, net, other = (m.to(x.device) for m in (Student(net, 1, 1), apart, net, other))
    see = frozen_views(tuned.backbone, aug, True, tuned.original, other)
    batch = Batch(x, torch.zeros(len(x), dtype=torch.long, device=x.device), rng(0))
    with autocast("auto", x.device):
        held = see(batch)
    jobs = {"ERPM": (tuned.tuned, erpm_step(cfg, see)),
            "ERPM, cached": (tuned.tuned, erpm_step(cfg, lambda batch: held)),
            "FT": (copy.deepcopy(net).requires_grad_(True),
                   plain_step(cfg, frozen_views(nn.Identity(), aug))),
            "ERPM without sharing": (apart, erpm_step(
                cfg, frozen_views(nn.Identity(), aug, True, net, other)))}

    def once(model: nn.Module, opt: torch.optim.Optimizer, step: Callable) -> None:
        with autocast("auto", x.device):
            loss, _ = step(model, batch)
        loss.backward()
        opt.step()
        opt.zero_grad()

    return {method: functools.partial(once, model.train(), make_optimizer(model, cfg), step)
            for method, (model, step) in jobs.items()}


def bench_train() -> Iterator[dict]:
    """A step of ERPM, live and cached, over networks and batches, against FT, ERPM without sharing
    and a matrix product of as many FLOPs; those, and what waits for the backward pass, counted."""
    device, parts = pick_device(), ("ERPM", "ERPM, cached")
    side = 8192 if device.type == "cuda" else 1024
    square = torch.randn(side, side, device=device, dtype=amp_type("auto", device))
    keep = lambda v: held.update({v.untyped_storage()._cdata: v.untyped_storage().nbytes()}) or v
    for label, *nets in (("ViT-Ti/16", "vit_tiny_patch16_224", "resnet18"),
                         ("ViT-S/16", "vit_small_patch16_224", "resnet18"),
                         ("ViT-L/14@336", "vit_large_patch14_clip_336", "vit_base_patch16_224")):
        need, x = {}, torch.empty(8, 3, 224, 224, dtype=torch.uint8, device="meta")
        for part, step in training_steps(*nets, x).items():
            held, watch = {}, torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v)
            with FlopCounterMode(display=False) as counter, watch:
                step()
            need[part] = counter.get_total_flops() / 8e9, sum(held.values()) / 1e9
        for part, (k, unit) in itertools.product(parts, enumerate(("GFLOPs an image", "GB of 8"))):
            ours, theirs = need[part][k], need["FT"][k]
            yield {"part": f"{part}, {label}", "against": f"FT, {unit}", "ours": ours,
                   "theirs": theirs, "ratio": round(theirs / ours, 2), "spread": "counted"}
        for n in (8, 32, 128, 512) if square.is_cuda else (2, 8) if nets[1] == "resnet18" else ():
            with contextlib.suppress(torch.OutOfMemoryError):
                steps, x = None, make_shapes(n, 224, "test")[0].to(device)
                steps = training_steps(*nets, x)
                steps["a matrix product"] = lambda: square @ square
                for part, other in itertools.product(parts, [*steps][2:]):
                    m = 2e-9 * side ** 3 / need[part][0] if other == "a matrix product" else n
                    yield {"part": f"{part}, {label}, batch {n}", "against": other,
                           **paired(steps[part], steps[other], n, m)}


def bench_eval() -> Iterator[dict]:
    """The choice of the head over networks and batches, against the plain forward; the last row:
    against three whole networks, of which each passes once a sample."""
    nets = {"ViT-Ti/16": "vit_tiny_patch16_224", "ViT-S/16": "vit_small_patch16_224"}
    ways = {"closed form": ("head", 0), "10 in heads": ("head", 10), "10 in the tail": ("tail", 10)}
    for label, n, way in itertools.product(nets, (1, 8), ways):
        x, (where, passes) = make_shapes(n, 224, "test")[0].to(pick_device()), ways[way]
        net = freeze(named(f"timm:{nets[label]}", 1000, "random", 224)).to(x.device)
        student = freeze(Student(net, 1, 1, dropout_in=where)).to(x.device)
        ours, share = lambda: student.predict(x, passes), gflops(student, 224, passes)
        part = f"{way}, {label}, batch {n} (FLOPs x {share / gflops(net, 224):.2f})"
        yield {"part": part, "against": "the network", **paired(ours, lambda: net(x), n, n)}
    naive = lambda: [net(x[:1]) for _ in range(3 * passes)]
    yield {"part": part, "against": "3 networks, 10 passes", **paired(ours, naive, n, 1)}


BENCHES = {"images": bench_images, "loader": bench_loader, "train": bench_train, "eval": bench_eval}


# ==== 12. COMMANDS ====
# In: the command line.  Out: files under runs/NAME, a few lines on the terminal, an exit code:
# 0 done, 2 a mistake that the message explains, 130 or 143 stopped and ready to go on.


def alone(cfg: Config):
    """Lock, to be closed, of the one command that works in the run's folder; it dies with its
    process.  Raises: UserError while another has it; or where processes differ in settings."""
    import fcntl
    if len(set(gathered(sha(repr(cfg), versions()["erpm"])))) > 1:
        raise UserError("the processes were started with different settings, or copies of erpm.py: "
                        "start them alike")
    cfg.dir.mkdir(parents=True, exist_ok=True)
    file = open(cfg.dir / f".lock{world()[0] or ''}", "a+")          # a file a process
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise UserError(f"{cfg.dir}: {file.read()} is at work there: wait for it, or take another "
                        "run=NAME") from None
    file.truncate(0)
    print(f"process {os.getpid()} on {os.uname().nodename}", end="", file=file, flush=True)
    return file


def training_images(data: Data, m: Model) -> ImageSet:
    """The training images, in the student's own view, for which it is built without memory; with
    data.on_bad_image=skip without those that cannot be read, which are listed."""
    card = read_weights(m.student_weights)[1] if m.student_weights else None
    with torch.device("cpu" if m.student.startswith("open_clip:") else "meta"):
        card = card or named(m.student, None, "random", data.size_px).card
    images, (rank, size) = open_set(data.name, data, "train", card.view), world()
    if data.on_bad_image == "stop" or isinstance(images.images, Tensor):
        return images
    paths = [images.images[i] for i in images.index]
    with ThreadPool(max(1, data.workers)) as pool:                   # Pillow lets threads run
        found = gathered(pool.map(unreadable, paths[rank::size]))    # a share a process
    bad = set(itertools.chain(*found)) - {""}
    say(f"left out, for they cannot be read: {len(bad)} of {len(images):,} pictures "
        + ", ".join(sorted(bad)))
    return dataclasses.replace(images, index=images.index[[p not in bad for p in paths]])


# ---- what is computed once: frozen views, samples of [B] -----------------------------------------

DRAWN = ("seed", "data.name", "data.size_px", "data.fit", "data.crop", "data.flip",
         "data.n_train", "data.on_bad_image")        # what an x depends on
HARDENED = ("robustify.augment", "robustify.severity", "robustify.pictures")       # and its x~


def missing(what: str, images: ImageSet, cfg: Config, batch: int, files: dict) -> Iterator[tuple]:
    """(keys, x, y, index) of the batches of which a file is missing, this process's share of them;
    it ends when all are there.  files: {(epoch, position): path}.  Raises: KeyboardInterrupt."""
    keys, (rank, size), device = list(files), world(), pick_device()
    jobs = [keys[at:at + batch] for at in range(0, len(keys), batch)][rank::size]
    jobs = [job for job in jobs if not all(files[k].is_file() for k in job)]
    with Progress(sum(map(len, jobs)), what) as bar:
        loaded = loader(images, cfg.data.workers, batch_sampler=jobs)
        for job, (x, y, index) in zip(jobs, loaded):
            yield job, x.to(device), y.to(device), index
            bar.update(len(job))
            if bar.hit:
                raise KeyboardInterrupt(what)
    gathered()


@dataclass(eq=False)
class Rows(ImageSet):
    """Features kept in the place of images, a view an epoch, in turn; cost: of making them."""
    kept: Sequence[tuple[Tensor, ...]] = ()
    cost: dict[str, float] = dataclasses.field(default_factory=dict)

    def __getitems__(self, keys: Sequence[tuple[int, int]]):
        rows = [self.kept[(epoch * len(self) + k) % len(self.kept)] for epoch, k in keys]
        x = [torch.stack(v).float() for v in zip(*rows)]
        x = [v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for v in x]
        index = self.index[[k for _, k in keys]]
        return x, torch.from_numpy(self.y[index]), torch.from_numpy(index)


def cached(cfg: Config, images: ImageSet, backbone: nn.Module, clean: bool = True,
           *teachers: nn.Module) -> tuple[ImageSet, Callable]:
    """(images, see), the frozen_views of a step; with distill.views files of what it gives for so
    many views of every image, made once by all processes, and what reads them."""
    d, device, n, since = cfg.distill, pick_device(), len(images), time.perf_counter()
    half = amp_type(cfg.runtime.amp, device) or torch.float32
    see = frozen_views(backbone, cfg.robustify, clean, *teachers)
    if not d.views:
        return images, see
    images = images.training(fold(cfg.seed, "distill"), cfg.data.crop, cfg.data.flip)
    key = [d.method, d.tune, d.batch, n, str(half), str(images.view), versions()["erpm"], cfg.model,
           operator.attrgetter(*DRAWN, *HARDENED)(cfg),
           *(sha(net.state_dict()) for net in (backbone, *teachers))]
    top = cfg.dir / f"views-{fold(key):016x}"
    top.mkdir(parents=True, exist_ok=True)
    with autocast(cfg.runtime.amp, device), FlopCounterMode(display=False) as counter:
        one = see(Batch(images.__getitems__([(0, 0)])[0].to(device), None, rng(0)))
    whole = d.views * n * sum(v.numel() for v in one) * half.itemsize
    say(f"views: {whole / 2 ** 30:.2f} GiB in {top}")
    lacks = whole - sum(file.stat().st_size for file in top.iterdir())
    if any(gathered(lacks > shutil.disk_usage(top).free)):
        raise UserError(f"distill.views: no room for them in {cfg.dir}: take fewer views, or "
                        "another out=FOLDER")
    kept, cost = [], {"seconds": 0, "gflops": d.views * n * counter.get_total_flops() / 1e9}
    for v in range(d.views):
        files = {(v, k): top / f"{v}-{k - k % d.batch}.safetensors" for k in range(n)}
        for keys, x, y, _ in missing(f"view {v + 1}", images, cfg, d.batch, files):
            with autocast(cfg.runtime.amp, device):
                found = see(Batch(x, y, rng("view", cfg.seed, keys)))
            took, since = time.perf_counter() - since, time.perf_counter()
            write_tensors(files[keys[0]], {str(i): t.to(half) for i, t in enumerate(found)},
                          Card(train={"seconds": took / world()[1]}))
        for file in dict.fromkeys(files.values()):
            state, card = read_weights(file)
            kept.append(torch.utils.data.TensorDataset(*(state[k] for k in sorted(state))))
            cost["seconds"] += card.train["seconds"]
    kept = torch.utils.data.ConcatDataset(kept)
    return Rows(**vars(images), kept=kept, cost=cost), operator.attrgetter("x")


def stored_samples(cfg: Config, images: ImageSet, teacher: nn.Module, vqgan: VQGAN) -> ImageSet:
    """The images with samples of [B] beside them, files CLASS/INDEX.png that all processes make."""
    r = cfg.robustify
    key = {"data": images.base, "view": str(images.view), "seed": cfg.seed, "n": len(images.y),
           "teacher": weights_sha(teacher), "vqgan": weights_sha(vqgan), **attack(r)}
    top = cfg.dir / f"samples-{fold(key):016x}"
    paths = [top / slug(images.classes[k]) / f"{i:08d}.png" for i, k in enumerate(images.y)]
    files = {(0, k): paths[i] for k, i in enumerate(images.index)}
    for keys, x, y, index in missing("samples", images, cfg, r.batch // world()[1], files):
        draws = [rng("dad", cfg.seed, i) for i in index.tolist()]
        with autocast(cfg.runtime.amp, x.device):
            made = dad_samples(x, y, teacher, vqgan, draws, **attack(r))
        for k, picture in zip(keys, _bytes(255 * made).cpu()):
            v2.functional.to_pil_image(picture).save(content := io.BytesIO(), "png")
            write_atomically(files[k], content.getvalue())
    beside = dataclasses.replace(images, images=paths, view=View(images.view.size_px, 1.0))
    if isinstance(images.images, Tensor):            # in memory, to be cut as the images are
        x = beside.__getitems__([(0, k) for k in range(len(beside))])[0]
        held = images.images.new_zeros(len(paths), *x.shape[1:])
        held[images.index] = x
        beside = dataclasses.replace(beside, images=held)
    return dataclasses.replace(images, beside=beside)


# ---- the networks of a run: make(cfg, images, *nets) -> [network], or where it is to be trained
# (network, module, step, images), as `fit` takes them --------------------------------------------

def untrained(net: Net, images: ImageSet) -> bool:
    """Whether the classifier is new, or of other classes than the set's, if of as many."""
    return net.card.fresh or bool(net.card.classes) and set(net.card.classes) != set(images.outputs)


def train_clip(cfg, images, prompts):
    """Both towers of an open_clip network, by cross-entropy over the prompts of all classes."""
    import open_clip
    name, size, (names, templates) = cfg.model.student, cfg.data.size_px, prompts
    clip = clip_model(name.partition(":")[2], "random", size)
    net = named(name, None, "random", size).to(pick_device())            # it knows mean and std
    texts = open_clip.get_tokenizer(name.partition(":")[2])(
        [templates[0].replace("{}", c) for c in names]).to(pick_device())

    def step(model, batch):
        h, t, scale = model(net.prepare(batch.x), texts)[:3]
        z = (scale * h @ t.T).float()
        return F.cross_entropy(z, batch.y, label_smoothing=cfg.pretrain.smoothing), {}

    clip.card = dataclasses.replace(net.card, clip="both towers", n_classes=len(names),
                                    prompts=prompts)
    return clip, clip, step, images


def make_student(cfg, images):
    """The large network: as it comes with text or a classifier for the classes, else trained."""
    m, t, text = cfg.model, cfg.pretrain, cfg.model.head == "text"
    if text and not m.student.startswith("open_clip:"):
        raise UserError(f"model.head=text: {m.student} has no text tower; take open_clip:NAME")
    prompts = prompts_of(images, m.templates, cfg.data.names) if text else ()
    if text and not m.student_weights and "/" not in m.student:
        return train_clip(cfg, images, prompts)
    net = named(m.student, None if text else len(images.classes), m.student_weights,
                cfg.data.size_px).to(pick_device())
    if text:
        return [zero_shot(net, prompts)]
    if not untrained(net, images):
        return [net]
    say(f"{m.student_weights or m.student} has no classifier for these {len(images.classes)} "
        "classes: it is trained first")
    if t.tune < 0:
        return net, net, plain_step(t), images
    stages(net)[-1].fc.load_state_dict(fit_probe(net, images, cfg)[-1].fc.state_dict())
    return [net]


def make_guide(cfg, images):
    """[B]'s teacher of the small network, made as a student is."""
    r = cfg.robustify
    head = "text" if r.teacher.startswith("open_clip:") else "linear"
    own = {"student": r.teacher, "student_weights": r.teacher_weights, "head": head}
    torch.manual_seed(fold(cfg.seed, "init student"))    # its weights are those of a student
    return make_student(changed(cfg, {"model": own}), images)


def make_vqgan(cfg, images):
    """The VQGAN of [B]: a file's, else trained on the images."""
    net = vqgan(cfg.vqgan.name, cfg.vqgan.weights)
    return [net] if cfg.vqgan.weights else (net, net, vqgan_step, images)


def make_teacher(cfg, images, guide=None, codes=None):
    """The small robust network; robustify.method=none: as it comes."""
    m, r, n = cfg.model, cfg.robustify, len(images.classes)
    net = named(m.teacher, n, m.teacher_weights, cfg.data.size_px)
    if r.method == "none" and untrained(net, images):
        raise UserError(f"robustify.method=none: {m.teacher_weights or m.teacher} has no trained "
                        f"classifier for these {n} classes")
    if r.method == "none":
        return [net]
    if codes and r.samples:
        images = stored_samples(cfg, images, guide, codes)
    return net, net, dad_step(r, guide, codes, n) if guide else robust_step(r, n), images


def tune_erpm(cfg, images, net, teacher):
    """[A]: three heads, distilled from the original network and the robust teacher."""
    d = cfg.distill
    student = Student(net, d.tune, min(d.head, d.tune), d.dropout, dropout_in=d.dropout_in)
    student.tuned.norms = d.norms
    images, see = cached(cfg, images, student.backbone, True, student.original, teacher)
    return student, student.tuned, erpm_step(d, see), images


def tune_team(cfg, images, net, teacher):
    """Ours: a second tail, its BatchNorm with own statistics, learns x~ alone; the rest stays."""
    both = Team(net, teacher, cfg.distill.tune)
    images, see = cached(cfg, images, both.net, False)
    return both, both.tails[1], plain_step(cfg.distill, see), images


def tune_apt(cfg, images, net, tune=None):
    """The same part, one head, no teacher, on clean and augmented images; tune = 0: LP."""
    d, tune = cfg.distill, cfg.distill.tune if tune is None else tune
    backbone, tail = cut(net, tune)
    images, see = cached(cfg, images, backbone)
    part = Tuned(*tail.requires_grad_(True))
    part.norms = d.norms
    tail[-1].features.requires_grad_(tune > 0)
    return net, part, plain_step(d, see), images


def tune_ft(cfg, images, net, part=None):
    """The whole network, or a part of it, end to end, on clean and augmented images."""
    see = frozen_views(nn.Identity(), cfg.robustify)
    return net, part or net.requires_grad_(True), plain_step(cfg.distill, see), images


def tune_wise(cfg, images, tuned, original):
    """(1 - wise) original + wise fine-tuned weights, at 0 and 1 exactly one of them: WiSE-FT
    (Wortsman et al. 2022); nothing is trained again."""
    end = copy.deepcopy(tuned.state_dict())
    load_strictly(tuned, original.state_dict(), "the original has other tensors")
    for k, v in tuned.state_dict().items():
        v.copy_(torch.lerp(v.double(), end[k].double(), cfg.distill.wise))  # BatchNorm counts too
    return [tuned]


def tune_vpt(cfg, images, net):
    """Prompt tokens of a ViT and the classifier."""
    prompted(net, cfg.distill.prompts, cfg.distill.deep)         # on a frozen network
    stages(net)[-1].fc.requires_grad_(True)
    return tune_ft(cfg, images, net, Tuned(net))


# name: (label, section, how it is made, what of, and what settings, or beginnings of them, count
# beside DRAWN: without a dot, of its section)
TUNED = " ".join((*HARDENED, *vars(Train())))
METHODS = {
    "student": ("original", "pretrain", make_student, "",
                "model.student model.head model.templates pretrain."),
    "guide": ("guide", "pretrain", make_guide, "", "robustify.teacher model.templates pretrain."),
    "vqgan": ("vqgan", "vqgan", make_vqgan, "", "vqgan."),
    "teacher": ("teacher", "robustify", make_teacher, "", "model.teacher robustify."),
    "erpm": ("ERPM", "distill", tune_erpm, "student teacher",
             f"{TUNED} tune head norms dropout alpha temperature views"),
    "team": ("Team", "distill", tune_team, "student teacher", f"{TUNED} tune views"),
    "apt": ("APT", "distill", tune_apt, "student", f"{TUNED} tune norms views"),
    "lp": ("LP", "distill", functools.partial(tune_apt, tune=0), "student",
           f"{TUNED} norms views"),
    "ft": ("FT", "distill", tune_ft, "student", TUNED),
    "lp-ft": ("LP-FT", "distill", tune_ft, "lp", TUNED),
    "wise": ("WiSE", "distill", tune_wise, "ft student", f"{TUNED} wise"),
    "vpt": ("VPT", "distill", tune_vpt, "student", f"{TUNED} prompts deep"),
}


def network(own: Config, images: ImageSet, role: str, words: dict = {}, label="") -> nn.Module:
    """The network of a row of METHODS, in own.dir: kept if it is there, else made, after what it is
    made from.  words: those of a row of compare, of which the file's name has what counts; without
    any it is the run's own, model.safetensors.  Raises: UserError where other settings made it."""
    cfg = changed(own, words, label)
    title, section, make, takes, uses = choose(METHODS, role, "distill.method")
    if role == "teacher":
        guide = "guide" if cfg.robustify.teacher else "student"
        takes = {"kd": guide, "dad": f"{guide} vqgan"}.get(cfg.robustify.method, "")
    nets, key = {}, {"made": role, "view": str(images.view)}
    for r in takes.split():
        if r == "teacher":                # what cannot be tuned says so before one is made
            cut(nets["student"], cfg.distill.tune)
        net = nets[r] = network(own, images, r, words)
        key = net.card.key | key | {r: weights_sha(net)}
    counts = (*DRAWN, *(u if "." in u else f"{section}.{u}" for u in uses.split()))
    for k in [path for path in FIELDS if path.startswith(counts)]:
        v = operator.attrgetter(k)(cfg)
        key[k] = sha(Path(v).read_bytes()) if isinstance(v, str) and os.path.isfile(v) else v
    counted = "".join(f"-{k.partition('.')[2]}={v}" for k, v in words.items() if k in key)
    file = "model" if role == cfg.distill.method and not words else slug(role + counted)
    path = cfg.dir / f"{file}.safetensors"
    if any(gathered(path.is_file())):                # all look before one writes
        net = load(path).to(pick_device())
        if other := differences(net.card.key, key):
            raise UserError(f"{path} was made with other settings ({other}): take another "
                            "run=NAME, or delete it to make it again")
        say(f"{section}: {path} is there, kept")
        if label and label != net.card.label:
            say(f"warning: it is {net.card.label}: {label} has no setting of its own that counts")
        return net
    if world()[0] == 0:
        text = yaml.safe_dump(dataclasses.asdict(own), sort_keys=False)
        write_atomically(cfg.dir / "config.yaml", f"# sha256 {sha(text)}\n{text}")
    stage = getattr(cfg, section)
    torch.manual_seed(fold(cfg.seed, f"init {role}"))
    net, *job = make(cfg, images.subset(stage.n_images), *nets.values())
    costs = [nets[r].card.train for r in nets if METHODS[r][1] == section]   # LP of LP-FT counts
    if job:
        part, step, some = job
        some = some.training(fold(cfg.seed, section), cfg.data.crop, cfg.data.flip)
        costs += [some.cost if isinstance(some, Rows) else {}, fit(
            part, step, some, stage, cfg.runtime, name=section, seed=cfg.seed, key=key,
            checkpoint=path.with_suffix(".ckpt"), workers=cfg.data.workers)]
    cost = {k: sum(c.get(k, 0) for c in costs) for k in (costs or [{}])[-1]}
    if world()[0] == 0:
        save(path, net, size_px=net.card.size_px or images.view.size_px, view=images.view,
             classes=images.outputs, home=images.base, label=label or slug(title + counted),
             key=key, train=cost, fresh=False)
        for old in cfg.dir.glob(f"{file}.ckpt*"):
            old.unlink()
    if any(gathered(Progress.hit)):                  # all wait for the file
        raise KeyboardInterrupt(f"{section} is done")
    say(f"{path}: {cost.get('images', 0):,} images in {cost.get('seconds', 0):.0f} s")
    return load(path).to(pick_device())


def networks(cfg: Config) -> Iterator[dict[str, nn.Module]]:
    """{label: network} for those that want the same pixels: of eval.models, else of a run, its
    original, teacher, what was tuned, and each in a team with the teacher."""
    found = {}
    for token in filter(None, map(str.strip, cfg.eval.models.split(","))):
        label, name, file = re.fullmatch(r"(?:([^:@=]+)@)?([^=]*)=?(.*)", token).groups()
        if (label or token) in found:
            raise UserError(f"--model: two networks are called {label or token}")
        net = found[label or token] = freeze(build(name, weights=file))
        if net.card.fresh and not name.startswith("run:"):
            raise UserError(f"--model {name} has no weights: add a tag (timm:resnet50.tv_in1k) or "
                            "a file (NAME=FILE), or name what a run made (run:runs/x)")
    if not found:
        order = {"student": 0, "teacher": 1, "model": 3}
        files = sorted(cfg.dir.glob("*.safetensors"), key=lambda p: (order.get(p.stem, 2), p.stem))
        nets = {p.stem: load(p) for p in files if p.stem != "vqgan"}
        found, teacher = {net.card.label: net for net in nets.values()}, nets.get("teacher")
        made = {weights_sha(n): n for stem, n in nets.items() if stem.startswith("teacher")}
        for stem, net in nets.items():
            if teacher and not stem.startswith(("teacher", "guide")) \
                    and not isinstance(net, Team) and net.card.classes == teacher.card.classes:
                own = made.get(net.card.key.get("teacher"), teacher)
                found[f"{net.card.label} + teacher"] = freeze(Team(net, own))
    if not found:
        raise UserError(f"no trained network in {cfg.dir}: run `python erpm.py distill` first")
    for view in dict.fromkeys(net.card.view for net in found.values()):
        some = {label: net for label, net in found.items() if net.card.view == view}
        yield {label: net.to(pick_device()) for label, net in some.items()}
        for net in some.values():
            net.cpu()                                    # room for the next ones


def set_names(cfg: Config) -> list[str]:
    """eval.sets, or the training set, its corrupted copy and its renditions."""
    name = cfg.data.name
    asked = [s.strip() for s in cfg.eval.sets.split(",") if s.strip()]
    if asked == ["all"]:
        return list(dict.fromkeys([*SETS, name, corrupted_name(name), "imagenet-c", "objectnet-c"]))
    return asked or [name, corrupted_name(name), *([f"{name}-r"] if f"{name}-r" in SETS else [])]


def run_eval(cfg: Config, args) -> None:
    """Scores a run's networks, or those of --model, on sets -> results.jsonl."""
    everything, asked = cfg.eval.sets.strip() == "all", set()
    for nets in networks(cfg):
        card, opened = next(iter(nets.values())).card, {}
        for name in set_names(cfg):                 # what is not there says so before any scoring
            try:
                opened[name] = aligned(open_set(name, cfg.data, view=card.view), card)
            except FileNotFoundError as e:
                if not everything:
                    raise
                say(f"left out: {str(e).partition(':')[0]}")
        for name, images in opened.items():
            able = []
            for label, net in nets.items():
                if isinstance(net, Team) and kind_of(net.card, images) == "transfer":
                    continue                        # it answers on the classes of home alone
                try:
                    able.append(headed(label, net, name, images, cfg))
                except UserError as e:
                    if (len(nets) == 1 or cfg.eval.models) and not everything:
                        raise
                    say(f"left out: {e}")
            asked |= score(dict(able), images, cfg)
    rows = [r | {"run": str(cfg.dir), "rule": cfg.eval.rule}
            for r in read_rows(cfg.dir) if r["of"] in asked]
    say(summary(latest(rows)) if rows else "nothing to score")
    say(f"results: {cfg.dir / 'results.jsonl'}; for tables and figures: report --run {cfg.dir}")


# ---- the other commands --------------------------------------------------------------------------

def pictures_of(run: Path, cfg: Config):
    """A matplotlib figure of 8 test images, clean and corrupted: the true class, and below it what
    the run's Student said, by which head, green where it is right."""
    from matplotlib.figure import Figure
    student = load(run).to(pick_device())
    if not isinstance(student, Student):
        raise UserError(f"{run}: one head, nothing to show")
    images = open_set(cfg.data.name, cfg.data, view=student.card.view).subset(8)
    x, y, index = images.__getitems__([(0, k) for k in range(len(images))])
    longest, names = max(map(len, images.classes)), ["", *CORRUPTIONS[::3]]
    fig = Figure((len(x) * (1.2 + 0.1 * longest), 2 * len(names)), dpi=80, layout="constrained")
    for axes, name in zip(fig.subplots(len(names), len(x), squeeze=False), names):
        shown = corrupt(x, name, 4, index=index) if name else x
        said = student.predict(shown.to(pick_device()), cfg.eval.passes, cfg.eval.rule)
        axes[0].set_ylabel(f"{name} 4" if name else "clean")
        for i, (ax, h, p, k) in enumerate(zip(axes, said.head, *said.probs.cpu().max(1))):
            ax.imshow(shown[i].permute(1, 2, 0).numpy())
            ax.set(title=images.classes[y[i]], xticks=[], yticks=[])
            ax.set_xlabel(f"{images.classes[k]} {p:.2f}\n{HEADS[h]}",
                          color="darkgreen" if k == y[i] else "firebrick")
    return fig


def run_report(cfg: Config, args) -> None:
    """results.jsonl of one or more runs -> report.md and figures in the first one."""
    runs, rows, drawn = [Path(r) for r in (args.run or str(cfg.dir)).split(",")], [], {}
    for run in runs:
        if not (found := read_rows(run)):
            raise UserError(f"no results in {run}: run `python erpm.py eval` first")
        rows += [r | {"run": str(run), "rule": cfg.eval.rule} for r in found]
    text = report_text(rows, cfg.compare.plan[0])
    say(text)
    try:
        drawn = figures(rows)
        with contextlib.suppress(UserError, OSError):    # no Student, or no test images
            drawn["pictures.png"] = pictures_of(runs[0], cfg)
    except ImportError:
        say("figures left out: matplotlib is not installed (pip install matplotlib)")
    for name, figure in drawn.items():
        figure.savefig(content := io.BytesIO(), format="png")
        write_atomically(runs[0] / name, content.getvalue())
        text += f"\n![{name}]({name})\n"
    write_atomically(runs[0] / "report.md", text)
    say(f"{runs[0]}: {', '.join(['report.md', *drawn])} written")


def run_stage(cfg: Config, args) -> None:
    """A network of the run (pretrain, robustify, distill), after what it is made from."""
    role = {"pretrain": "student", "robustify": "teacher"}.get(args.command, cfg.distill.method)
    network(cfg, training_images(cfg.data, cfg.model), role)


def run_compare(cfg: Config, args) -> None:
    """The runs of compare.rows (without rows the recipe's own), for every seed; eval, report."""
    folders, images = [], functools.cache(training_images)       # which most rows share
    role = lambda row: {"none": "teacher"}.get(row.distill.method, row.distill.method)
    for seed in range(cfg.seed, cfg.seed + cfg.compare.seeds):
        more = f"-s{seed}" if seed != cfg.seed else ""
        own = changed(cfg, {"seed": seed, "run": cfg.run + more})
        jobs = [(changed(own, words, x), words, x) for x, words in cfg.compare.plan[1].items()]
        jobs.sort(key=lambda job: [*METHODS].index(role(job[0])))    # after what it is made from
        with alone(own) if more else contextlib.nullcontext():
            for row, words, label in jobs:
                network(own, images(row.data, row.model), role(row), words, label)
            run_eval(own, args)
        folders.append(str(own.dir))
    args.run = ",".join(folders)
    if world()[0] == 0:
        run_report(cfg, args)


def run_sets(cfg: Config, args) -> None:
    """The data sets: what is there, what is expected, how to get it."""
    data = dataclasses.replace(cfg.data, allow_partial=True, n_train=0, n_test=0)
    archives, body = [corrupted_name(n) for n, row in SETS.items() if row.archive], []
    for name in dict.fromkeys([*set_names(cfg), *SETS, *archives]):
        row, is_c = set_row(name)
        try:
            found, get = len(open_set(name, data)), ""
        except (UserError, OSError) as e:
            found, get = "-" if isinstance(e, FileNotFoundError) else "spoilt", e
        body.append([name, found, row.n_test or "any", row.n_classes or "any",
                     row.archive if is_c else row.test, get])
    say(markdown(["set", "found", "expected", "classes", f"where (below {data.root})",
                  "how to get it"], body))
    say("NAME-c is made on the fly where there is no archive, of which one cell is counted")


def run_bench(cfg: Config, args) -> None:
    """Times our parts against public ones, as ratios -> bench.jsonl: bench [NAME ...]"""
    cfg.dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in args.paths or BENCHES:
        rows = list(choose(BENCHES, name, "bench")())
        with open(cfg.dir / "bench.jsonl", "a") as f:
            f.writelines(json.dumps({"bench": name, **r, "packages": versions()}) + "\n"
                         for r in rows)
        say(markdown(list(rows[0]), [list(r.values()) for r in rows]))


def run_corrupt(cfg: Config, args) -> None:
    """corrupt IN OUT: OUT/corruption/severity/class/name of a folder; what is there is kept."""
    if len(args.paths) != 2:
        raise UserError("corrupt takes two folders: corrupt IN OUT")
    source, out = map(Path, args.paths)
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"corrupt: {out} lies in {source}, take a folder beside it")
    if not (paths := pictures_below(source)):
        raise UserError(f"corrupt: no image below {source}")
    view = View(cfg.data.size_px or 224, squash=cfg.data.fit == "squash")
    images = ImageSet(str(source), [0] * len(paths), ["-"], view, paths)
    torch.set_num_threads(1)                             # a thread a picture

    def copies(k: int) -> None:
        x, _, index = images.__getitems__([(0, k)])
        file = Path(paths[k]).relative_to(source)
        for name, severity in CELLS:
            path = out / name / str(severity) / file
            if not path.is_file():
                y = v2.functional.to_pil_image(corrupt(x, name, severity, index=index)[0])
                kind = Image.registered_extensions()[file.suffix.lower()]
                y.save(content := io.BytesIO(), kind, quality=85)
                write_atomically(path, content.getvalue())

    with ThreadPool(cfg.data.workers or os.cpu_count()) as pool, \
            Progress(len(images), "corrupt") as bar:
        for _ in pool.imap(copies, range(len(images))):
            bar.update(1)
            if bar.hit:
                raise KeyboardInterrupt("corrupt")
    say(f"{out}: {len(images):,} images x {len(CELLS)} cells")


COMMANDS: dict[str, Callable] = {
    "demo": run_compare, "pretrain": run_stage, "robustify": run_stage, "distill": run_stage,
    "eval": run_eval, "compare": run_compare, "report": run_report, "bench": run_bench,
    "corrupt": run_corrupt, "sets": run_sets}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line's words; --help lists every key, its default, meaning and what is valid."""
    lines = "\n".join(f"  {name:<10} {(PARTS[name] if run is run_stage else run).__doc__}"
                      for name, run in COMMANDS.items())
    keys = ["keys, given as key=value:"]
    for path, f in FIELDS.items():
        section, dot, _ = path.partition(".")
        if dot and f is dataclasses.fields(PARTS[section])[0]:
            keys += ["", f"{section}: {PARTS[section].__doc__}"]
        valid = [*f.metadata["valid"]] or ""
        keys.append(f"  {f'{path}={f.default}':<42} {f.metadata['help']}  {valid}")
    p = argparse.ArgumentParser(
        prog="erpm.py", formatter_class=argparse.RawDescriptionHelpFormatter, argument_default="",
        description=f"{__doc__.split('Sections:')[0]}\ncommands:\n{lines}",
        epilog="\n".join(keys))
    p.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    p.add_argument("words", nargs="*", metavar="key=value",
                   help="settings, see below; bench and corrupt take names and paths too")
    p.add_argument("--recipe", help="recipe of config.yaml; demo has its own")
    p.add_argument("--config", help="another file of recipes; without --recipe, of settings")
    p.add_argument("--run", help="folder of the run; report: of several, joined by commas")
    p.add_argument("--set", help="eval: sets, joined by commas, or all")
    p.add_argument("--model", help="eval: networks instead of a run, see eval.models")
    args = p.parse_intermixed_args(argv)
    args.paths = [w for w in args.words if "=" not in w and args.command in ("bench", "corrupt")]
    args.words = [w for w in args.words if w not in args.paths]
    args.words += [f"eval.sets={args.set}"] if args.set else []
    if args.model:                                       # the run's name gives way to one of words
        args.words = ["run=models", f"eval.models={args.model}"] + args.words
    return args


def configure(args: argparse.Namespace) -> Config:
    """The Config of the command: for eval and report the run's own, where it has one."""
    recipe = args.recipe or ("demo" if args.command == "demo" else "")
    run = Path(args.run.split(",")[0] if args.command == "report" else args.run)
    words = args.words + ([f"out={run.parent}", f"run={run.name}"] if args.run else [])
    cfg, scores = resolve(words, recipe, args.config), args.command in ("eval", "report")
    if scores and (cfg.dir / "config.yaml").is_file():
        return resolve([*words, f"out={cfg.out}", f"run={cfg.run}"], file=cfg.dir / "config.yaml")
    if args.command == "eval" and args.run:
        raise UserError(f"no run {run}: it has no config.yaml")
    return cfg


def preflight(cfg: Config, command: str) -> None:
    """Raises: UserError for what would stop a long job late."""
    m, r, method = cfg.model, cfg.robustify, cfg.distill.method
    choose(RULES, cfg.eval.rule, "rule")
    spec_names(r.augment)
    for name in set_names(cfg):
        set_row(name)
    if COMMANDS[command] not in (run_stage, run_compare):
        return
    changed(cfg, {}, processes=world()[1])               # whether batches can be shared
    for file in (m.student_weights, m.teacher_weights, r.teacher_weights, cfg.vqgan.weights):
        if file and not Path(file).is_file():
            raise UserError(f"no file {file}")
    with torch.device("meta"):
        for name in {m.student, m.teacher, r.teacher} - {""}:
            if not name.startswith("open_clip:"):
                check = prompted if (method, name) == ("vpt", m.student) else freeze
                check(named(name, None, "random", cfg.data.size_px))
        vqgan(cfg.vqgan.name)
    if command == "distill" and m.head == "text" and method in ("lp", "lp-ft"):
        raise UserError(f"distill.method={method}: model.head=text has no linear layer to train")
    if command in ("demo", "compare"):
        for label, words in cfg.compare.plan[1].items():
            preflight(changed(cfg, words, f"compare.rows: {label}"), "distill")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    Progress.hit, cfg, code, text, told = 0, Config(), 2, "", False
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            warnings.filterwarnings("ignore", "Grad strides do not match")       # of 1 x 1 kernels
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        cfg = configure(args)
        if cfg.runtime.offline:
            os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        preflight(cfg, args.command)
        run = COMMANDS[args.command]
        together = run in (run_eval, run_stage, run_compare)
        with alone(cfg) if together else contextlib.nullcontext():
            if together or world()[0] == 0:
                run(cfg, args)
        return 0
    except (UserError, OSError, UnicodeDecodeError) as e:    # from a loader with its traceback
        text = str(e).split("UserError: ")[-1]
        _kill_workers()                    # one that failed would be waited for
    except KeyboardInterrupt as e:
        code = 128 + (Progress.hit or signal.SIGINT)
        text = f"stopped ({str(e) or 'at once'}); the same command goes on from here"
    except (MemoryError, RuntimeError) as e:
        if not re.search("[Mm]emory|create a primitive|new thread|CUDA", repr(e)):
            raise
        sizes = ", ".join(f"{k}={operator.attrgetter(k)(cfg)}" for k in FIELDS if "batch" in k)
        text = (f"out of memory, or the GPU failed: lower a batch ({sizes}; or raise its accum) or "
                f"data.workers; what is saved stays ({str(e)[:160]})")
    finally:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):                  # the store may be gone
                told = text and dist.distributed_c10d._get_default_store().add("told", 1) > 1
            dist.destroy_process_group()
    if not told:                                                     # by another process
        print(f"erpm.py: {' '.join(text.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
