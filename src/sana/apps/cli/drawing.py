"""Carries out an order: draws run by run, and saves each batch while the next is drawn."""

import contextlib
import dataclasses
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana.apps.cli.choosing import Judges, told
from sana.apps.cli.existing import is_as_asked, is_ruin
from sana.apps.cli.known import DEFAULT_MODEL
from sana.apps.cli.machine import out_of_memory_told
from sana.apps.cli.manifest import Manifest, digest
from sana.apps.cli.order import Job, Order, told_as_flags
from sana.apps.cli.output import Progress, Terminal, duration
from sana.apps.cli.report import BatchFailed, PartialBatch, Report
from sana.apps.cli.sheet import Sheet
from sana.apps.cli.values import runs_of
from sana.apps.cli.writer import Task, Writer, print_png
from sana.engine.request import Request, Result
from sana.errors import InvalidInput, NonFinite, OutOfMemory, SanaError

if TYPE_CHECKING:
    from sana.engine.generate import Reply
    from sana.engine.latents import Finished
    from sana.engine.parts import Parts
    from sana.flow.samplers import Step

SOFT_EDGES = frozenset({"soft-edge", "hed", "scribble"})
"""Kinds of control pictures that look alike."""
MOST_SHOWN = 4
"""Pictures of an order that are shown in the terminal without being asked for."""
MOST_FAILURES = 5
"""Reasons that are told at the end of a batch."""


class Drawing:
    """An order in work; with a manifest, what fails is noted there and the rest goes on."""

    def __init__(
        self, parts: "Parts", order: Order, report: Report, terminal: Terminal, manifest: Manifest | None = None
    ) -> None:
        self.parts, self.order, self.report, self.terminal = parts, order, report, terminal
        self.manifest = manifest
        self.writer = Writer()
        self.sheet = Sheet(order) if order.sheet is not None else None
        self.latents: list[Path] = []
        """Files of finished latents whose pictures are not written yet."""
        self.count = len(order.seeds)
        self.judges = Judges()
        self._ruins: set[Path] = set()
        """Files that are what is left of pictures, and are to be replaced."""
        self._entries: dict[int, dict[str, Any]] = {}
        self._progress: Progress
        self._drawn = self._steps_done = self._steps = 0

    def run(self) -> None:
        """Draw and save everything; what is finished stays whatever happens to the rest.

        Raises:
            PartialBatch: some pictures were written before an error.
        """
        requests = self.order.fitted(self.parts.effective_card)
        self._warn_of_kinds()
        steps = [request.resolve(self.parts.effective_card).steps for request in requests]
        todo = [self._todo(job, request) for job, request in zip(self.order.jobs, requests, strict=True)]
        drawn = [job.best_of or len(seeds) for job, seeds in zip(self.order.jobs, todo, strict=True)]
        self._steps = sum(count * n if seeds else 0 for seeds, count, n in zip(todo, drawn, steps, strict=True))
        try:
            with self.terminal.count(max(self._steps, 1)) as self._progress, self.writer, out_of_memory_told():
                for job, request, seeds in zip(self.order.jobs, requests, todo, strict=True):
                    for run in runs_of(seeds):
                        self._draw(job, request.replace(seed=run.start, count=len(run)))
            self._save_sheet()
            self._finish()
        except (SanaError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            self._explain(error)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self._written()}{self._rescued()}") from None
        finally:  # what is told of an error has what was done before it
            self.terminal.draft = self.report.to_dict()

    def _warn_of_kinds(self) -> None:
        """Say which control pictures are of another kind than the network was trained for."""
        made_for = self.parts.effective_card.control
        kinds = {control.kind for job in self.order.jobs for control in job.request.controls}
        alike = SOFT_EDGES if made_for in SOFT_EDGES else {made_for}
        own = made_for is not None and self.order.machine.controlnet is None
        for kind in sorted(kinds - {"map", *alike} if own else ()):
            self.terminal.warn(f"The control network was made for {made_for}, not for {kind}; expect less of it.")

    def _finish(self) -> None:
        """Tell how a batch went.

        Raises:
            BatchFailed: some of it could not be drawn.
        """
        if self.manifest is None:
            return
        drawn, there, failed = len(self.report.files), len(self.report.skipped), self.manifest.failures
        told = [f"{drawn} drawn", f"{there} there already" if there else "", f"{len(failed)} failed" if failed else ""]
        self.terminal.say(f"{drawn + there + len(failed)} pictures: {', '.join(filter(None, told))}.")
        if not failed:
            return
        lines = dict.fromkeys(f"{entry['line']}: {entry['error']}" for entry in failed)
        shown = list(lines)[:MOST_FAILURES]
        for text in shown:
            self.terminal.say(f"  {text}")
        more = f" The first {len(shown)} reasons are above." if len(lines) > len(shown) else ""
        raise BatchFailed(f"{len(failed)} of the pictures could not be drawn.{more} The same command tries them again.")

    def _explain(self, error: SanaError | OSError) -> None:
        """Raise the error again, with what was written in spite of it."""
        if isinstance(error, BatchFailed):
            raise error
        reason = str(error) if isinstance(error, SanaError) else f"{error.strerror or error}."
        if hasattr(error, "latents"):  # its own text speaks to callers in Python
            reason = "The memory is full: the picture cannot be decoded, not even in pieces. Lower --size."
        elif not self.report.files and not self.latents:
            raise error
        text = f"{reason} {self._written()}{self._rescued()}"
        if self.report.files:
            raise PartialBatch(text) from error
        raise (OutOfMemory if isinstance(error, OutOfMemory) else SanaError)(text) from error

    def _written(self) -> str:
        done = f"{len(self.report.files)} of {self.count} pictures were written."
        if self.count == 1 or self.order.to_stdout or len(self.report.files) == self.count:
            return done
        if self.manifest is not None:
            return f"{done} For the rest, run the same command again."
        seed = f"--seed {self.order.seeds[0]} " if self.order.drew_seed else ""
        return f"{done} For the rest, repeat the command with {seed}--skip-existing."

    def _rescued(self) -> str:
        names = [str(path) for path in self.latents if path.exists()]
        return "".join(f" Finished latents are in {name}; for their pictures: sana decode {name}" for name in names)

    def _todo(self, job: Job, request: Request) -> list[int]:
        """Return the seeds of a job whose pictures are to be drawn.

        Raises:
            InvalidInput: a file that would be skipped is no whole picture.
        """
        if not self.order.writing.skip_existing:
            return list(job.seeds)
        here = {seed: file for seed, file in zip(job.seeds, job.files, strict=True) if file.exists()}
        for seed, file in list(here.items()):
            if self.manifest is not None and is_ruin(file):
                self.terminal.warn(f"{file} is no whole picture; it is drawn anew.")
                self._ruins.add(file)
                del here[seed]
                continue
            try:
                if not is_as_asked(file, request.resolve(self.parts.effective_card)):
                    self.terminal.warn(f"{file} was drawn with other settings; it is left as it is.")
            except InvalidInput as error:
                self._note_failure(job, [seed], error)
                del here[seed]
        self.report.skipped += map(str, here.values())
        if self.sheet is not None:
            for seed, file in here.items():
                self.sheet.add_file(job, seed, file)
        self.count -= len(here)
        broken = {entry["file"] for entry in self.report.failed}
        return [
            seed
            for seed, file in zip(job.seeds, job.files, strict=True)
            if seed not in here and str(file) not in broken
        ]

    def _draw(self, job: Job, request: Request) -> None:
        """Draw a run of consecutive seeds; in a batch what cannot be drawn is noted, and the rest goes on."""
        rest = request
        while True:
            before = self._drawn
            error = self._attempt(job, rest)
            if error is None:
                return
            drawn = self._drawn - before
            # What memory or a number failed for is one batch of pictures; anything else would fail for all of them.
            one_batch = isinstance(error, OutOfMemory | NonFinite)
            lost = min(rest.batch_size if one_batch else rest.count, rest.count - drawn)
            first = int(rest.seed or 0) + drawn
            self._note_failure(job, range(first, first + lost), error)
            self._drawn += lost
            if drawn + lost >= rest.count:
                return
            rest = rest.replace(seed=first + lost, count=rest.count - drawn - lost)

    def _note_failure(self, job: Job, seeds: Sequence[int], error: SanaError) -> None:
        """Write down what could not be drawn; without a manifest that ends the order. Raises the error then."""
        if self.manifest is None:
            raise error
        files = {seed: job.files[job.seeds.index(seed)] for seed in seeds}
        text = told_as_flags(str(error))
        self.manifest.failed(files, text, job.entry.place, _digest(job))
        self.report.failed = list(self.manifest.failures)
        self.terminal.event("failed", files=[str(file) for file in files.values()], message=text)
        self.terminal.say(f"{job.entry.place}: {text}")

    def _attempt(self, job: Job, request: Request) -> SanaError | None:
        """Draw pictures of consecutive seeds, and return the error that ended it early."""
        before, began = self._steps_done, time.perf_counter()
        loop = self._loop(job, request)
        done = 0
        with contextlib.closing(loop):
            while True:
                try:
                    with out_of_memory_told():
                        event = next(loop)
                except StopIteration as end:
                    self.report.add(end.value)
                    return None
                except SanaError as error:
                    if self.manifest is None:
                        raise
                    return error
                self.writer.poll()
                if isinstance(event, Result):
                    now = time.perf_counter()
                    self._save(job, event, (now - began) / len(event.images))
                    began, done = now, done + len(event.images)
                    self._steps_done = before + (job.best_of or done) * event.settings.steps
                    continue
                rows = min(request.batch_size, (job.best_of or request.count) - done)
                self._advance(event, before + done * event.num_steps + (event.index + 1) * rows, job, done)
                if job.best_of is not None and event.index + 1 == event.num_steps:
                    done += rows

    def _loop(self, job: Job, request: Request) -> "Generator[Step | Result, Reply, Result]":
        from sana.engine.generate import generate
        from sana.evaluation.selection import draw_best

        def rescue(finished: "Finished") -> None:
            self._rescue(job, finished)

        if job.best_of is None:
            return generate(self.parts, request, rescue=rescue, keep=False)
        judge = self.judges.of(job.settings.values, self.parts)
        return draw_best(self.parts, request, judge, job.best_of, rescue=rescue)

    def _advance(self, step: "Step", steps_done: int, job: Job, done: int) -> None:
        number = self._drawn + 1
        title = f"picture {min(number, self.count)}/{self.count} · " if self.count > 1 else ""
        title += f"candidate {min(done + 1, job.best_of)}/{job.best_of} · " if job.best_of else ""
        text = f"step {step.index + 1}/{step.num_steps}"
        self._progress.move(min(steps_done, self._steps), self._steps, title + text)
        self.terminal.event("step", step=step.index + 1, of=step.num_steps, picture=number, pictures=self.count)

    def _save(self, job: Job, result: Result, seconds: float) -> None:
        """Hand the pictures of a finished batch to the writer."""
        self._drawn += len(result.images)
        for text in result.warnings:
            self.terminal.warn(text)
        result = dataclasses.replace(result, model=self._named(result.model))
        settings = {**result.settings.to_dict(), "seed": job.seeds[0], "count": len(job.seeds)}
        self.report.settings = self.report.settings or settings
        self.report.model = dict(result.model)
        if len(self.order.jobs) > 1 and id(job) not in self._entries:
            entry = self._entries[id(job)] = {"settings": settings, "files": [], "seeds": []}
            self.report.jobs.append(entry)
        rescued = [path for path in self.latents if path.exists()]
        for i in range(len(result.images)):
            last = i == len(result.images) - 1
            self.writer.put(self._task(job, result, i, seconds, rescued if last else ()))

    def _task(self, job: Job, result: Result, i: int, seconds: float, rescued: Sequence[Path]) -> Task:
        from sana.engine.images import save_png

        seed, writing = result.seeds[i], self.order.writing
        target = job.files[i if result.selection else job.place(seed)]

        def write() -> None:
            if self.order.to_stdout:
                print_png(result, i, writing.metadata)
            else:
                if target in self._ruins and is_ruin(target):  # another process may have drawn it meanwhile
                    target.unlink()
                save_png(result, i, target, metadata=writing.metadata, force=writing.force)

        def tell() -> None:
            self._tell(job, result, i, target, seconds)
            for path in rescued:
                path.unlink(missing_ok=True)

        return Task(target, write, tell)

    def _tell(self, job: Job, result: Result, i: int, target: Path, seconds: float) -> None:
        """Say that a picture was written, and note it."""
        seed, image, settings = result.seeds[i], result.images[i], result.settings
        self.report.files.append(str(target))
        self.report.seeds.append(seed)
        chosen = dict(result.selection[i]) if result.selection else {}
        self.report.selection += [chosen] if chosen else []
        if id(job) in self._entries:
            self._entries[id(job)]["files"].append(str(target))
            self._entries[id(job)]["seeds"].append(seed)
        if not self.order.to_stdout:
            self.terminal.result(str(target))
        if self.manifest is not None:
            self.manifest.done(target, seed, seconds, job.entry.place, _digest(job))
        more = {"selection": chosen} if chosen else {}
        self.terminal.event("image", file=str(target), seed=seed, seconds=round(seconds, 4), **more)
        steps = f"{settings.steps} step{'s' if settings.steps != 1 else ''}"
        device = result.model.get("device", "")
        self.terminal.say(f"seed {seed} · {image.width}x{image.height} · {steps} · {device} · {duration(seconds)}")
        if chosen:
            self.terminal.say(told(chosen))
        if self.sheet is not None:
            self.sheet.add(job, job.seeds[i] if chosen else seed, image)
        elif len(self.report.files) <= MOST_SHOWN or self.terminal.thumbnail:
            self.terminal.show(image)

    def _named(self, model: Any) -> dict[str, Any]:
        """Return the facts about the model, with the place where a later command finds it if its name is no such."""
        source = self.order.machine.source
        return dict(model) if model.get("name") in (source, DEFAULT_MODEL) else {**model, "source": source}

    def _rescue(self, job: Job, finished: "Finished") -> None:
        """Save finished latents that could not be decoded at once; what then happens may end the command."""
        from sana.engine.latents import SUFFIX, save_latents

        target = job.files[job.place(finished.seeds[0])]
        stem = target.stem if not self.order.to_stdout else f"latents-{finished.seeds[0]}"
        places = (target.with_name(f"{stem}{number}{SUFFIX}") for number in ("", *(f"-{n}" for n in range(2, 1000))))
        place = next(path for path in places if not path.exists())
        finished = dataclasses.replace(finished, model=self._named(finished.model))
        try:
            save_latents(place, finished)
        except (OSError, SanaError) as error:
            self.terminal.warn(f"The finished latents could not be saved ({str(error).rstrip('.')}).")
            return
        self.latents.append(place)
        self.terminal.say(f"Memory ran out while decoding; the finished latents are in {place} until it worked.")

    def _save_sheet(self) -> None:
        if self.sheet is None or self.order.sheet is None:
            return
        writing = self.order.writing
        target = self.order.sheet
        force = writing.force or writing.skip_existing
        self.sheet.save(target, self.report.model, metadata=writing.metadata, force=force)
        self.report.sheet = str(target)
        self.terminal.result(str(target))
        self.terminal.event("sheet", file=str(target))
        self.terminal.show(self.sheet.image(str(self.report.model.get("name", ""))))


def _digest(job: Job) -> str:
    """Return what stands in a manifest for all the settings of a picture but its seed."""
    return digest(job.settings.values, ("seed", "count", "batch_size", "output", "prompt_file"))
