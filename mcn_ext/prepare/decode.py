"""A media file -> its frame at each whole second, and its spectrogram, by PyAV.

Runs in a process of its own (:func:`serve`): what a broken file does to a decoder ends there.
Time 0 is the start of the file, as players and captions count; frames and samples go where their
time stamps say, so that variable frame rates, gaps and late starts come out right.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np

from mcn_ext.prepare import Skipped
from mcn_ext.prepare.logmel import SAMPLE_RATE, log_mel

MAX_SECONDS = 48 * 3600  # beyond, a time stamp lies
MAX_PIXELS = 2**26  # twice 8K
MAX_DAMAGED = 0.05  # share of packets that cannot be decoded
MEL_BLOCK = 2**16  # frames of a spectrogram in a message
PLAYLISTS = {"hls", "concat", "dash", "imf"}  # they name other files
GAP = 0.1  # seconds that samples may be off their time stamps: clocks are rounded


def import_av():
    """PyAV, or SystemExit that says how to get it."""
    try:
        import av
    except ImportError as error:
        raise SystemExit(
            f"videos are decoded with PyAV: pip install av (or pip install -e '.[video]'); {error}"
        ) from error
    return av


class Seconds:
    """Of frames in the order of their times, the one nearest to each whole second, once known."""

    def __init__(self):
        self.second, self.time, self.frame = 0, 0.0, None

    def add(self, at: float, frame) -> Iterator:
        """The next frame, shown from ``at`` (s); yields (second, time, frame) now settled."""
        if at > MAX_SECONDS:
            raise Skipped(f"a time stamp of {at:.0f} s")
        while self.frame is not None and self.second - self.time <= at - self.second:
            yield self.second, self.time, self.frame
            self.second += 1
        self.time, self.frame = max(at, self.time), frame

    def end(self, length: float) -> Iterator:
        """The last frame is shown for ``length`` s: the seconds until then; at least one in all."""
        while self.frame is not None and (self.second < self.time + length or not self.second):
            yield self.second, self.time, self.frame
            self.second += 1


class Samples:
    """Mono float32 at 16 kHz, on disk, each at the place its time stamp says."""

    def __init__(self, av):
        self.av, self.file, self.count = av, tempfile.TemporaryFile(), 0
        self.resampler = self._resampler()

    def _resampler(self):
        return self.av.AudioResampler("flt", "mono", SAMPLE_RATE)

    def add(self, frame, at: float) -> None:
        """A decoded frame that begins at ``at`` (s)."""
        if at > MAX_SECONDS:
            raise Skipped(f"a time stamp of {at:.0f} s")
        late = at - self.count / SAMPLE_RATE
        if late > GAP or (not self.count and late > 0):  # zeros where there is nothing
            self._write(self.resampler.resample(None))
            self.resampler = self._resampler()
            missing = round(at * SAMPLE_RATE) - self.count
            self.count += max(0, missing)
            self.file.seek(4 * self.count)
        elif late + frame.samples / frame.sample_rate < -GAP:
            return  # said before
        frame.pts = None  # the resampler is to keep to the samples
        try:
            self._write(self.resampler.resample(frame))
        except ValueError:  # another format from here on
            self._write(self.resampler.resample(None))
            self.resampler = self._resampler()
            self._write(self.resampler.resample(frame))

    def _write(self, frames) -> None:
        for frame in frames:
            samples = frame.to_ndarray().ravel()
            # A float may be anything, as a codec's may; 8 is beyond all that was recorded.
            self.file.write(np.nan_to_num(samples, posinf=0, neginf=0).clip(-8, 8).tobytes())
            self.count += len(samples)

    def end(self) -> None:
        """Nothing more comes; from here on samples may be read."""
        self._write(self.resampler.resample(None))
        self.file.truncate(4 * self.count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        """Samples of a slice, (n,) float32."""
        lo, hi, _ = part.indices(self.count)
        self.file.seek(4 * lo)
        return np.frombuffer(self.file.read(4 * (hi - lo)), np.float32)


def decode(path: str, *, video: bool = True, audio: bool = True, threads: int = 1) -> Iterator:
    """Yields ("frame", (second, time s, (h, w, 3) uint8 RGB)) and, last, the spectrogram in parts,
    ("mel", (n, 40) float16).

    ("alive", None) comes about once a second between. A file without sound has no "mel"; one
    without video (or with a cover picture only) no "frame". Skipped for what cannot be used.
    """
    av = import_av()
    try:
        # No name is an address, and nothing in a file leads to one.
        with av.open(
            f"file:{path}", metadata_errors="replace", options={"protocol_whitelist": "file"}
        ) as container:
            yield from _decode(av, container, video, audio, threads)
    except av.FFmpegError as error:
        raise Skipped(f"{path}: {error.strerror or error}") from error
    except Skipped as reason:
        raise Skipped(f"{path}: {reason}") from reason


def _decode(av, container, video: bool, audio: bool, threads: int) -> Iterator:
    if container.format.name.split(",")[0] in PLAYLISTS:
        raise Skipped(f"a playlist ({container.format.name}), not a video")
    cover = av.stream.Disposition.attached_pic
    pictures = [s for s in container.streams.video if not s.disposition & cover][:video]
    sounds = list(container.streams.audio)[:audio]
    if not pictures and not sounds:
        raise Skipped("neither video nor sound in it")
    zero = (container.start_time or 0) / av.time_base
    seconds, samples, good, damaged, alive = Seconds(), Samples(av), 0, 0, time.monotonic()
    end, length, shown = 0.0, 0.0, None
    for stream in pictures + sounds:
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
    for stream in pictures:
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            raise Skipped(
                f"frames of {stream.codec_context.width} x {stream.codec_context.height} pixels"
            )
        length = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    for packet in container.demux(*pictures, *sounds):
        try:
            frames = packet.decode()
            good += 1
        except av.FFmpegError:
            damaged += 1
            continue
        for frame in frames:
            at = None if frame.time is None else frame.time - zero
            if packet.stream in sounds:
                at = samples.count / SAMPLE_RATE if at is None else at
                samples.add(frame, at)
                end = max(end, at + frame.samples / frame.sample_rate)
            else:
                at = seconds.time + length * (seconds.frame is not None) if at is None else at
                for settled in seconds.add(at, frame):
                    shown = _upright(settled, shown)
                    yield "frame", shown
                end = max(end, at + length)
        if time.monotonic() - alive > 1:
            alive = time.monotonic()
            yield "alive", None
    for settled in seconds.end(length):
        shown = _upright(settled, shown)
        yield "frame", shown
    if damaged > MAX_DAMAGED * (good + damaged):
        raise Skipped(f"{damaged} of {good + damaged} packets cannot be decoded")
    declared = (container.duration or 0) / av.time_base
    if end < 0.9 * declared - 2:
        raise Skipped(f"breaks off after {end:.0f} of {declared:.0f} s")
    samples.end()
    if not end or not len(samples) and shown is None:
        raise Skipped("nothing in it can be decoded")
    mel = log_mel(samples) if len(samples) else ()
    for lo in range(0, len(mel), MEL_BLOCK):
        yield "mel", mel[lo : lo + MEL_BLOCK].astype(np.float16)


def _upright(settled, before):
    """(second, time, pixels): RGB, turned as the file says; ``before`` again for the same frame."""
    second, at, frame = settled
    if before is not None and before[1] == at:
        return second, at, before[2]
    pixels = frame.to_ndarray(format="rgb24")
    return second, at, np.rot90(pixels, round(frame.rotation / 90))


def serve(pipe: Connection, path: str, **options) -> None:
    """:func:`decode` into a pipe. Messages: a letter, then what belongs to it.

    f: height, width (4 bytes each, big-endian), pixels. m: a part of the spectrogram. a: alive.
    s: why the file is skipped. e: the end.
    """
    try:
        for kind, value in decode(path, **options):
            if kind == "frame":
                size = np.array(value[2].shape[:2], ">u4").tobytes()
                pipe.send_bytes(b"f" + size + value[2].tobytes())
            else:
                pipe.send_bytes(b"m" + value.tobytes() if kind == "mel" else b"a")
        pipe.send_bytes(b"e")
    except (BrokenPipeError, KeyboardInterrupt):
        pass  # nobody wants it any more
    except Exception as error:  # the parent goes on with the next file
        reason = (
            error
            if isinstance(error, Skipped)
            else (f"{path}: could not be decoded ({type(error).__name__}: {error})")
        )
        pipe.send_bytes(b"s" + str(reason).encode("utf-8", "replace"))
