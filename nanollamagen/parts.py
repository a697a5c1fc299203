"""Long work that can be stopped at any moment and continued: it is made in parts.

    part_files = parts.make("encode", folder, final, settings, count=1000, size=64, work=work)
    if part_files:                                         # on process 0, when all parts exist
        for codes in parts.each(part_files, "codes"):      # one array of every part, in order
            ...                                            # join them into `final`

Under torchrun the processes take turns at the parts, and process 0 waits for the others' files. No
two processes write to the same file, because on NFS they would lose each other's work.
"""

import json
import os
import shutil
import time

import numpy as np

from nanollamagen import files


def processes():
    """The number of this process and the number of all processes, as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def make(name, folder, final, settings, count, size, work):
    """Make the parts that are missing. Returns the files of all parts, in order, on process 0 and
    None on the others.

    name      what the progress bar says
    folder    holds the parts until they are joined
    final     the file that process 0 writes last, after joining; then there is nothing to make
    settings  plain values that decide what is in the parts; ValueError if folder has others
    count     items, such as images, of the whole work; `size` of them make a part
    work      work(ranges, bar) yields a part, a dict of arrays, for each range of items in turn;
              it calls bar.update(items) before it yields them"""
    rank, world = processes()
    begin(folder, settings)
    ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]
    part_files = [folder / f"{items.start:09d}.npz" for items in ranges]
    todo = [i for i in range(rank, len(ranges), world) if not part_files[i].exists()]
    # Asked after looking for parts, because process 0 may have joined and removed them by now.
    if final.exists():
        shutil.rmtree(folder, ignore_errors=True)
        return None

    if world > 1:
        name = f"{name} (process 1 of {world})"
    todo_ranges = [ranges[i] for i in todo]
    with files.progress(sum(map(len, todo_ranges)), name, rank) as bar:
        for i, arrays in zip(todo, work(todo_ranges, bar)):
            tmp = part_files[i].with_suffix(".tmp")
            with open(tmp, "wb") as f:
                np.savez(f, **arrays)
            os.replace(tmp, part_files[i])
    if rank > 0:
        return None
    if world > 1:
        print(f"{name}: waiting for the other processes", flush=True)
    wait(part_files)
    return part_files


def begin(folder, settings):
    """Make the folder of parts, with its settings, or check that it was begun with the same."""
    file, text = folder / "settings.json", json.dumps(settings)
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():  # every process writes the same, whichever is first
        tmp = folder / f"settings.{processes()[0]}.tmp"
        tmp.write_text(text)
        os.replace(tmp, file)
    if file.read_text() != text:
        fix = "repeat those, or delete it to start over"
        raise ValueError(f"{folder} was begun with other settings; {fix}")


def wait(paths):
    """Wait until all these files exist. Files of another node can take a minute to show on NFS."""
    for path in paths:
        while not path.exists():
            time.sleep(1)


def each(part_files, name):
    """Yield the array of this name of every part, so that memory holds one part at a time."""
    for file in part_files:
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays[name]
