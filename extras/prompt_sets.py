"""The built-in lists of prompts, fetched when first used: pickscore, geneval, ocr, hpdv2.

The first three train and evaluate. They are Flow-GRPO's files (github.com/yifan123/flow_grpo, MIT)
at one commit; DiffusionNFT has the same ones, and the paper's five stages use them.

    pickscore   prompts of Pick-a-Pic. Some of them are not safe for work.
    geneval     an object per line: "prompt", and in "include" what its picture must show
    ocr         prompts with the wanted text in straight double quotes
    hpdv2       HPSv2's benchmark (github.com/tgxs002/HPSv2, Apache-2.0): it only evaluates

VGRPO_PROMPTS_URL names a mirror, http://... or file:///..., that is laid out like FOLDER.
"""
import hashlib
import json
import os
import uuid
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm

from rewards import UsageError

FLOW_GRPO = ("https://raw.githubusercontent.com/yifan123/flow_grpo/"
             "ac4c86e8cae021841f1fde853d340e0db67690dd/dataset/")
HPDV2 = (f"{constants.ENDPOINT}/datasets/zhwang/HPDv2/resolve/"
         "260dbde75ab1c68e86d32a8e7739f1b49b100578/benchmark/")
FOLDER = Path(constants.HF_ASSETS_CACHE, "vgrpo", "prompts")     # in ~/.cache/huggingface/assets
RECORD = "recorded.json"
NAMES = ("pickscore", "geneval", "ocr", "hpdv2")
FILES = {                                                        # the id git gives the contents
    "pickscore/train.txt": "a437bd921c03fbc00c4e7ce148ae2d28fcd6e49b",           # 25,432 lines
    "pickscore/test.txt": "45f05231b969fb5f74c8debd606b22cd3be27f8e",            # 2,048
    "geneval/train_metadata.jsonl": "0b97e8a6802c08fc7537cd00c76ae79c851bddcb",
    "geneval/test_metadata.jsonl": "27cdaf5cc1356fe15aeadbb8df55682ca74228f0",   # 2,212
    "ocr/train.txt": "3ce0521b77b0a9031191d66ecc36ebaaf27a3922",
    "ocr/test.txt": "8deb4f8d8f2e863f45353354243669b3c991a6a2",                  # 1,018
    "hpdv2/anime.json": None, "hpdv2/concept-art.json": None,    # unknown: the first download
    "hpdv2/paintings.json": None, "hpdv2/photo.json": None}      # tells, later ones must equal it

def load(name):
    """-> items to train on, items to evaluate on; an item is {"prompt": str, **metadata}."""
    if name not in NAMES:
        raise UsageError(f"there is no set of prompts {name}; there are {', '.join(NAMES)}")
    train, test = [], {}
    for file in FILES:
        if file.startswith(f"{name}/train"):
            # Repeats stay: they are the weight of geneval's tasks that have few prompts.
            train += read(file)
        elif file.startswith(f"{name}/"):
            # Each prompt once: geneval's test list holds every one four times.
            test |= {item["prompt"]: item for item in read(file)}
    return train, list(test.values())

def read(file):
    """The items of one file, which is fetched first if it is not there."""
    path = FOLDER / file
    try:
        if not path.exists():
            fetch(file, path)
        data = path.read_bytes()
        check(file, data)
        return parse(file, data)
    except (OSError, ValueError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{file}: {reason}; save {address(file)} as {path}") from error

def fetch(file, path):
    """Bring a file to the folder. Of several ranks one asks; the others wait and find it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(FOLDER / "lock"):            # it has a substitute where a disk lacks flock
        if path.exists():
            return
        data = download(file)
        check(file, data)
        parse(file, data)                          # what is no list of prompts is never recorded
        if FILES[file] is None:
            ids = recorded_ids() | {file: git_id(data)}
            write_whole(FOLDER / RECORD, json.dumps(ids, indent=1).encode())
        write_whole(path, data)

def address(file):
    if mirror := os.environ.get("VGRPO_PROMPTS_URL"):
        return f"{mirror.rstrip('/')}/{file}"
    return HPDV2 + Path(file).name if file.startswith("hpdv2/") else FLOW_GRPO + file

def download(file):
    if constants.HF_HUB_OFFLINE and "VGRPO_PROMPTS_URL" not in os.environ:
        raise OSError("HF_HUB_OFFLINE forbids to fetch it")
    with urlopen(address(file), timeout=30) as response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError("an HTML page came instead of it (from a proxy?)")
        data, size = bytearray(), int(response.headers.get("Content-Length", 0))
        with tqdm(desc=file, total=size or None, unit="B", unit_scale=True, delay=5) as bar:
            while part := response.read(1 << 16):
                data += part
                bar.update(len(part))
    if size and len(data) != size:
        raise OSError(f"the connection broke after {len(data)} of {size} bytes")
    return bytes(data)

def recorded_ids():
    path = FOLDER / RECORD
    return json.loads(path.read_text()) if path.exists() else {}

def git_id(data):
    """What `git hash-object` says of these contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

def check(file, data):
    """Refuse contents other than those of the pinned commit or of the first download."""
    expected, found = FILES[file] or recorded_ids().get(file), git_id(data)
    if expected not in (None, found):
        source = "the pinned commit" if FILES[file] else RECORD
        raise ValueError(f"git hash-object gives {found[:8]} for it, {source} has {expected[:8]}")

def write_whole(path, data):
    """A file appears whole or not at all, whatever happens meanwhile."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

def parse(file, data):
    """-> items in the file's order, with stripped prompts"""
    lines = [line for line in data.decode().split("\n") if line.strip()]
    if file.endswith(".jsonl"):
        items = [json.loads(line) for line in lines]
    else:
        prompts = json.loads(data) if file.endswith(".json") else lines
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
            raise ValueError("it is no list of prompts")
        items = [{"prompt": prompt} for prompt in prompts]
    items = [item | {"prompt": item["prompt"].strip()} for item in items]
    return [item for item in items if item["prompt"]]
