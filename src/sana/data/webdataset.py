"""Shards as a data set: tars of pictures with captions beside them, as WebDataset and the original code write them.

The members of a sample share a key: `a.png`, with `a.json` (a record as `texts` describes, and for the original code
width and height), `a.txt` or `a.caption`. Files of JSON beside the tar `s.tar` whose names begin with `s` add to it,
keyed by sample: captions as {key: {captioner: text}}, CLIP scores as {key: {captioner: score}}. `wids-meta.json` tells
which tars there are, and how many samples each has.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sana.data.identity import identity_of
from sana.data.pictures import picture_size, read_picture
from sana.data.samples import BadSample, Caption, Finding, Sample
from sana.data.tar import Index, Member, Opened, read_index, read_member, shown, split_name
from sana.data.texts import MAX_JSON, captions_of, number, one_line, parse_json, replaced
from sana.errors import SanaError

if TYPE_CHECKING:
    from PIL.Image import Image

META = "wids-meta.json"
PICTURES = ("png", "jpg", "jpeg", "webp")


class _Entry(NamedTuple):
    """A sample of a shard: its members by suffix."""

    shard: int
    key: str
    members: Mapping[str, Member]


class ShardSource:
    """The samples of one tar or of many, in the order of the tars and of their members."""

    def __init__(self, tars: Sequence[tuple[Path, str, int | None]], *, prompt: str = "") -> None:
        """Index the tars and read what lies beside them; no member is read.

        Args:
            tars: path, name for messages, and the number of samples that is told of it, if any.
            prompt: caption of pictures that have none.

        Raises:
            BadData: one of them is no file that can be read.
        """
        self.prompt, self._identities = prompt, dict[bool, str]()
        self._shards = [read_index(path, place) for path, place, _ in tars]
        self._beside: list[dict[str, dict[str, Any]]] = []
        self._entries: list[_Entry] = []
        findings: list[Finding] = []
        siblings = [path for path, _, _ in tars]
        for shard, (index, (_, _, told)) in enumerate(zip(self._shards, tars, strict=True)):
            groups = _groups(index)
            entries = [_Entry(shard, key, members) for key, members in groups.items() if _picture(members)]
            lost = [key for key, members in groups.items() if not _picture(members)]
            if told is not None and told != len(entries):
                kind, text = "lost" if told > len(entries) else "count", f"{META} tells of {told} samples"
                lost_here = Finding(kind=kind, place=index.place, text=f"{text}, {len(entries)} are there.",
                                    samples=max(0, told - len(entries)))  # fmt: skip
                findings.append(lost_here)
            if lost:
                index.tell("ignored", f"{len(lost)} samples have no picture, the first is {shown(lost[0])}.")
            self._beside.append(_read_beside(index, siblings, findings))
            self._entries += entries
        self.findings: tuple[Finding, ...] = tuple(
            [finding for index in self._shards for finding in index.findings] + findings
        )

    def __len__(self) -> int:
        """Return the number of samples with a picture."""
        return len(self._entries)

    def sample(self, index: int) -> Sample:
        """Return a sample; the header of its picture and its texts are read. Raises BadSample."""
        entry = self._entries[index]
        captions = self._captions(entry)
        place = self._place(entry)
        try:
            with self._open(entry) as file:
                width, height = picture_size(file, "picture", place)
        except BadSample:
            raise
        except SanaError as error:
            raise BadSample(Finding(kind="unreadable", place=place, text=str(error))) from None
        stem = self._shards[entry.shard].place.removesuffix(".tar")
        return Sample(key=f"{stem}/{entry.key}", place=place, width=width, height=height, captions=captions)

    def picture(self, index: int) -> "Image":
        """Return a picture in RGB, upright. Raises BadSample."""
        entry = self._entries[index]
        place = self._place(entry)
        try:
            with self._open(entry) as file:
                return read_picture(file, "picture", place)
        except BadSample:
            raise
        except SanaError as error:
            raise BadSample(Finding(kind="unreadable", place=place, text=str(error))) from None

    def encoded(self, index: int) -> tuple[bytes, str]:
        """Return a picture as it is stored, and its suffix. Raises BadSample."""
        entry = self._entries[index]
        suffix = _picture(entry.members)
        return read_member(self._shards[entry.shard], entry.members[suffix]), f".{suffix}"

    def shard(self, index: int) -> tuple[Path, str]:
        """Return the tar that a sample is in, and its key there."""
        entry = self._entries[index]
        return self._shards[entry.shard].path, entry.key

    def identity(self, *, captions: bool = True) -> str:
        """Return the digest over keys, captions, sizes and both ends of all pictures; see `Source`."""
        if captions not in self._identities:
            told = (lambda i: self._captions(self._entries[i])) if captions else None
            self._identities[captions] = identity_of(
                map(self._place, self._entries), lambda i: self._open(self._entries[i]), told
            )
        return self._identities[captions]

    def _open(self, entry: _Entry) -> io.BufferedReader:
        member = entry.members[_picture(entry.members)]
        return io.BufferedReader(Opened(self._shards[entry.shard], member))

    def _place(self, entry: _Entry) -> str:
        return f"{self._shards[entry.shard].place}:{entry.members[_picture(entry.members)].name}"

    def _captions(self, entry: _Entry) -> tuple[Caption, ...]:
        """Return the captions in the sample and beside the tar, with the scores that name them."""
        index, found = self._shards[entry.shard], list[Caption]()
        beside = self._beside[entry.shard].get(entry.key, {})
        where = f"{index.place}:{entry.key}"
        for suffix in ("json", "txt", "caption"):
            if suffix in entry.members:
                found += _within(index, entry.members[suffix], suffix, beside.get("score", {}), found)
        known = {caption.name: i for i, caption in enumerate(found)}
        for name, text in beside.get("text", {}).items():
            caption = Caption(text=" ".join(text.split()), name=name)
            if name in known:
                found[known[name]] = caption
            elif caption.text:
                found.append(caption)
        scores = beside.get("score", {})
        found = [replaced(caption, "score", scores.get(caption.name)) for caption in found if caption.text]
        if not found and self.prompt:
            found = [Caption(text=self.prompt)]
        if not found:
            has_text = any(suffix in entry.members for suffix in ("txt", "caption", "json"))
            text = "The caption is empty." if has_text else "The picture has no caption, in the tar or beside it."
            raise BadSample(Finding(kind="empty-caption" if has_text else "no-caption", place=where, text=text))
        return tuple(found)


def listed(folder: Path, findings: list[Finding]) -> list[tuple[Path, str, int | None]]:
    """Return the tars of a folder: those that its `wids-meta.json` names, or all of them."""
    meta = folder / META
    if not meta.is_file():
        return [(path, path.name, None) for path in sorted(folder.glob("*.tar"))]
    try:
        with meta.open("rb") as file:
            content = parse_json(file.read(MAX_JSON), META)
    except BadSample as error:
        findings.append(error.finding)
        content = {}
    shards = content.get("shardlist") if isinstance(content, dict) else None
    if not isinstance(shards, list):
        findings.append(Finding(kind="bad-text", place=META, text='There is no list "shardlist" in it.'))
        shards = []
    tars: dict[str, tuple[Path, str, int | None]] = {}
    for shard in shards:
        url, told = (shard.get("url"), shard.get("nsamples")) if isinstance(shard, dict) else (None, None)
        fault = _not_inside(folder, url)
        if fault:
            kind = "missing" if "There is no" in fault else "bad-name"
            lost = told if isinstance(told, int) and told > 0 else 1
            findings.append(Finding(kind=kind, place=META, text=fault, samples=lost))
        else:
            tars[str(url)] = (folder / str(url), str(url), told if isinstance(told, int) else None)
    return [tars[url] for url in sorted(tars)]


def _not_inside(folder: Path, url: object) -> str:
    """Return why a shard of that name is not read: only files of this folder are."""
    if not isinstance(url, str) or not url:
        return f"A shard has no `url`: {str(url)[:40]!r}."
    name = shown(url)
    if "://" in url or url.startswith("pipe:"):
        return f"The shard '{name}' is no file of this folder. Download it and give its name."
    if url.startswith("/") or "\\" in url or "\0" in url or ".." in url.split("/"):
        return f"The shard '{name}' lies outside of this folder. Move it in and give its name."
    return "" if (folder / url).is_file() else f"There is no shard {name} here."


def _groups(index: Index) -> dict[str, dict[str, Member]]:
    """Return key -> suffix -> member."""
    groups: dict[str, dict[str, Member]] = {}
    for member in index.members:
        key, suffix = split_name(member.name)
        group = groups.setdefault(key, {})
        if suffix in PICTURES and _picture(group):
            index.tell("bad-name", f"Sample {shown(key)} has two pictures. The second is left out.", member.name)
        else:
            group[suffix] = member
    return groups


def _picture(members: Mapping[str, Member]) -> str:
    """Return the suffix of the picture among the members of a sample, empty where there is none."""
    return next((suffix for suffix in PICTURES if suffix in members), "")


def _within(
    index: Index, member: Member, suffix: str, scores: Mapping[str, float], before: Sequence[Caption]
) -> Iterator[Caption]:
    """Yield the captions of one text of a sample; of its record also the texts that the scores beside the tar name."""
    place = f"{index.place}:{shown(member.name)}"
    data = read_member(index, member)
    if suffix != "json":
        text = one_line(data, place)
        if text and text not in [caption.text for caption in before]:
            yield Caption(text=text)
        return
    record = parse_json(data, place)
    if not isinstance(record, dict):
        raise BadSample(
            Finding(kind="bad-text", place=place, text="It holds no JSON object, which stands in {braces}.")
        )
    found = captions_of(record, place)
    yield from found
    names = {caption.name for caption in found}
    for name in scores:
        other = record.get(name)
        if name not in names and isinstance(other, str) and other.strip():
            yield Caption(text=" ".join(other.split()), name=name)


def _read_beside(index: Index, tars: Sequence[Path], findings: list[Finding]) -> dict[str, dict[str, Any]]:
    """Return key -> {"text": captioner -> text, "score": captioner -> score} of the files of JSON beside a tar."""
    found: dict[str, dict[str, Any]] = {}
    stem = index.path.stem
    longer = [tar.stem for tar in tars if tar.stem.startswith(stem) and tar.stem != stem]
    for path in sorted(index.path.parent.glob("*.json")):
        name = path.name
        if not name.startswith(stem) or name == META or any(name.startswith(other) for other in longer):
            continue
        try:
            with path.open("rb") as file:
                content = parse_json(file.read(MAX_JSON), name)
            _take_in(content, name, found)
        except BadSample as error:
            findings.append(error.finding)
    return found


def _take_in(content: Any, place: str, found: dict[str, dict[str, Any]]) -> None:
    """Sort the captions, or the scores, of one file of JSON in. Raises BadSample."""
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        text = "It is no object of objects, {sample: {captioner: text or score}}."
        raise BadSample(Finding(kind="bad-text", place=place, text=text))
    values = [value for told in content.values() for value in told.values()]
    are_scores = all(_is_number(value) for value in values)
    for key, told in content.items():
        kind = found.setdefault(key, {}).setdefault("score" if are_scores else "text", {})
        for captioner, value in told.items():
            if are_scores:
                kind[captioner] = number(value, f"score of {shown(key)}", place)
            elif isinstance(value, str):
                kind[captioner] = value


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    return True
