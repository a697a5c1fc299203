"""Names of classes: ImageNet's, a model's own, and the one that a user means.

names = classes.class_names(model)
classes.find_class("red fox", names)          # 277
"""

import difflib
import re
import sys
import unicodedata
from pathlib import Path


def imagenet_classes():
    """The 1000 names in label order, each a list of synonyms separated by commas."""
    path = Path(__file__).parent.parent / "assets" / "imagenet_classes.txt"
    return [line.split(" ", 1)[1] for line in path.read_text().splitlines()]


def class_names(model):
    """Names of a model's classes in label order: its own, ImageNet's for 1000, else numbers."""
    if model.classes:
        return model.classes
    if model.config.num_classes == 1000:
        return imagenet_classes()
    return [str(i) for i in range(model.config.num_classes)]


def find_class(text, names):
    """Class id of what a user typed: a name, else an id, else part of a name. Raises ValueError."""
    text = text.strip()
    wanted, *plain = (unicodedata.normalize("NFC", name).lower() for name in (text, *names))
    synonyms = [[word.strip() for word in name.split(",")] for name in plain]
    found = [i for i, words in enumerate(synonyms) if wanted in words]
    if re.fullmatch("-?[0-9]+", text):
        if not found and not 0 <= int(text) < len(names):
            raise ValueError(f"class {text} is out of range: ids go from 0 to {len(names) - 1}")
        if found and found != [int(text)]:
            print(f"class {text}: taken as a name, that of id {found[0]}", file=sys.stderr)
        found = found or [int(text)]
    found = found or [i for i, name in enumerate(plain) if wanted in name]
    if len(found) == 1:
        return found[0]
    if found:
        close, what = found[:12], "fits several classes"
    else:
        class_of = {word: i for i in reversed(range(len(names))) for word in synonyms[i]}
        words = difflib.get_close_matches(wanted, class_of, 6, 0.5)
        close, what = [class_of[word] for word in words], "is no class's name"
    message = f"class {text!r} {what}"
    if close:
        message += "; close ones: " + "; ".join(f"{i} {names[i]}" for i in dict.fromkeys(close))
    raise ValueError(message)
