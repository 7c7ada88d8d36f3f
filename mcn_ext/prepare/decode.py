"""A media file -> its frame at each whole second, and its spectrogram, by PyAV.

Runs in a process of its own (:func:`serve`), so that a file that crashes libav costs itself alone.
Time 0 is the start of the file, as players and captions count; frames and samples go where their
time stamps say, so that variable frame rates, gaps and late starts come out right.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from mcn_ext.prepare import Skipped
from mcn_ext.prepare.logmel import SAMPLE_RATE, log_mel

MAX_SECONDS = 48 * 3600  # a time stamp beyond is wrong
MAX_PIXELS = 2**26  # twice 8K
MAX_DAMAGED = 0.05  # share of packets that cannot be decoded
# Formats that name other files, or addresses.
PLAYLISTS = {"hls", "concat", "dash", "imf", "sdp", "rtsp", "vobsub", "image2"}
GAP = 0.1  # seconds that samples may be off their time stamps, as clocks are rounded


def import_av():
    """PyAV, or SystemExit that says how to get it."""
    try:
        import av
    except ImportError as error:
        raise SystemExit(
            f"videos are decoded with PyAV: pip install av (or pip install -e '.[video]'); {error}"
        ) from error
    return av


def open_media(path: str | Path):
    """A local media file as an av container, for a ``with``. All media are opened here.

    Its name is no address, and nothing in it leads to another file or one. Skipped if it cannot be
    opened.
    """
    av = import_av()
    formats = ",".join(av.formats_available - PLAYLISTS)  # a playlist would open what it names
    options = {"protocol_whitelist": "file", "format_whitelist": formats}
    try:
        return av.open(f"file:{path}", metadata_errors="replace", options=options)
    except av.error.ArgumentError as error:  # what FFmpeg answers for a format that is not listed
        raise Skipped(f"{path}: a playlist, not a video or sound file") from error
    except (av.FFmpegError, OSError) as error:
        raise Skipped(f"{path}: {error.strerror or error}") from error


def frame_at(files: list[Path], seconds: float) -> np.ndarray | None:
    """(h, w, 3) uint8, the frame ``seconds`` after the start of the first file that has pictures;
    None where none has."""
    av = import_av()
    for file, seek in product(files, (True, False)):
        last = None
        try:
            with open_media(file) as container:
                zero = container.start_time or 0
                if seek:
                    container.seek(zero + int(seconds * av.time_base))
                for frame in container.decode(video=0):
                    # Before a key frame, what a seek has landed on decodes to grey.
                    if frame.time is None or (last is None and not frame.key_frame):
                        continue
                    now = frame.time - zero / av.time_base
                    if seek and last is None and now > seconds + 0.1:
                        break  # the seek went past: from the start, then
                    last = frame
                    if now >= seconds:
                        break
        except (Skipped, av.FFmpegError, IndexError, OSError):
            pass  # a playlist, sound alone, or damaged from here on
        if last is not None:
            return last.to_ndarray(format="rgb24")
    return None


class Seconds:
    """Chooses the frame nearest to each whole second from frames in the order of their times."""

    def __init__(self):
        self.second, self.time, self.frame = 0, 0.0, None

    def add(self, at: float, frame) -> Iterator:
        """The next frame, shown from ``at`` (s); yields (second, time, frame) that are decided."""
        if at > MAX_SECONDS:
            raise Skipped(f"a time stamp of {at:.0f} s")
        while self.frame is not None and self.second - self.time <= at - self.second:
            yield self.second, self.time, self.frame
            self.second += 1
        self.time, self.frame = max(at, self.time), frame

    def end(self, length: float) -> Iterator:
        """The last frame is shown for ``length`` s: the seconds until then, at least one in all."""
        while self.frame is not None and (self.second < self.time + length or not self.second):
            yield self.second, self.time, self.frame
            self.second += 1


class Samples:
    """Mono float32 at 16 kHz, in a file (hours do not fit into memory), each where its time stamp
    says."""

    def __init__(self, av):
        self.av, self.file, self.count = av, tempfile.TemporaryFile(), 0
        self._renew()

    def _renew(self) -> None:
        self.resampler = self.av.AudioResampler("flt", "mono", SAMPLE_RATE)

    def add(self, frame, at: float) -> None:
        """A decoded frame that begins at ``at`` (s)."""
        if at > MAX_SECONDS:
            raise Skipped(f"a time stamp of {at:.0f} s")
        late = at - self.count / SAMPLE_RATE
        if late > GAP or (not self.count and late > 0):  # zeros where there is no sound
            self._flush()
            self.count = max(self.count, round(at * SAMPLE_RATE))
            self.file.seek(4 * self.count)
        elif late + frame.samples / frame.sample_rate < -GAP:
            return  # this time has its sound already
        frame.pts = None  # or the resampler would fill gaps, too
        try:
            self._write(self.resampler.resample(frame))
        except ValueError:  # another format from here on
            self._flush()
            self._write(self.resampler.resample(frame))

    def _flush(self) -> None:
        self._write(self.resampler.resample(None))
        self._renew()

    def _write(self, frames) -> None:
        for frame in frames:
            samples = frame.to_ndarray().ravel()
            # A codec's float may be anything; no recording is beyond 8.
            self.file.write(np.nan_to_num(samples, posinf=0, neginf=0).clip(-8, 8).tobytes())
            self.count += len(samples)

    def end(self) -> np.ndarray:
        """All samples, (n,) float32."""
        self._flush()
        self.file.truncate(4 * self.count)
        self.file.flush()
        return np.memmap(self.file, np.float32, "r") if self.count else np.zeros(0, np.float32)


def decode(path: str, *, video: bool = True, audio: bool = True, threads: int = 1) -> Iterator:
    """Yields ("frame", (second, time s, (h, w, 3) uint8 RGB)) and last ("mel", (n, 40) float16).

    ("alive", None) comes about once a second between. A file without sound has no "mel"; one
    without video (or with a cover picture only) no "frame". Skipped for what cannot be used.
    """
    av = import_av()
    container, length = _open(av, path)
    try:
        with container:
            yield from _decode(av, container, length, video, audio, threads)
    except av.FFmpegError as error:
        raise Skipped(f"{path}: {error.strerror or error}") from error
    except OSError as error:
        raise SystemExit(
            f"{path}: its sound could not be kept in the temporary folder {tempfile.gettempdir()} "
            f"({error.strerror}). Make room, or set TMPDIR to another folder; the same command "
            "then resumes"
        ) from error
    except Skipped as reason:
        raise Skipped(f"{path}: {reason}") from reason


def _open(av, path: str) -> tuple:
    """(container, its length in seconds as the file says it, 0 where it does not)."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.WARNING)
    try:
        with av.logging.Capture() as log:
            container = open_media(path)
    finally:
        av.logging.set_level(level)
    # Files without an index, as .aac and some .mp3: FFmpeg guesses, and says so in its log alone.
    guessed = any("Estimating duration" in message for _, _, message in log)
    return container, 0.0 if guessed else (container.duration or 0) / av.time_base


def _streams(av, container, video: bool, audio: bool, threads: int) -> tuple[list, list]:
    """The streams of pictures (the first) and of sound (the first) that are wanted."""
    cover = av.stream.Disposition.attached_pic
    pictures = [s for s in container.streams.video if not s.disposition & cover][:video]
    sounds = list(container.streams.audio)[:audio]
    if not pictures and not sounds:
        raise Skipped("neither video nor sound in it")
    for stream in pictures + sounds:
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
    for stream in pictures:
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise Skipped(f"frames of {width} x {height} pixels")
    return pictures, sounds


def _decode(av, container, declared: float, video: bool, audio: bool, threads: int) -> Iterator:
    pictures, sounds = _streams(av, container, video, audio, threads)
    zero = (container.start_time or 0) / av.time_base
    seconds, samples, packets, damaged = Seconds(), Samples(av), 0, 0
    n_pictures, end, rest, alive = 0, 0.0, 0.0, time.monotonic()
    for stream in pictures:
        rest = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    # Of all streams: a second sound track may be what the file's length is that of.
    for packet in container.demux():
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base) - zero)
        if packet.stream not in pictures + sounds:
            continue
        packets += 1
        try:
            frames = packet.decode()
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
                at = seconds.time + rest * (seconds.frame is not None) if at is None else at
                if frame.duration:  # long, in a slide show
                    rest = float(frame.duration * frame.time_base)
                yield from map(_upright, seconds.add(at, frame))
                n_pictures, end = n_pictures + 1, max(end, at + rest)
        if time.monotonic() - alive > 1:
            alive = time.monotonic()
            yield "alive", None
    if n_pictures <= seconds.time + 1:  # less than one a second: a slide show, whose last stays
        # Without sound, only a file that says so itself: a broken one has few pictures, too.
        slow = any((stream.average_rate or 1) < 1 for stream in pictures)
        until = samples.count / SAMPLE_RATE if sounds else declared * slow
        rest, end = max(rest, until - seconds.time), max(end, until)
    yield from map(_upright, seconds.end(min(rest, declared or rest)))
    if damaged > MAX_DAMAGED * packets:
        raise Skipped(f"{damaged} of {packets} packets cannot be decoded")
    if end < 0.9 * declared - 2:
        raise Skipped(f"breaks off after {end:.0f} of {declared:.0f} s")
    sound = samples.end()
    if not end or not (len(sound) or seconds.second):
        raise Skipped("nothing in it can be decoded")
    if len(sound):
        yield "mel", log_mel(sound).astype(np.float16)


def _upright(settled) -> tuple:
    """The message of a frame: RGB, turned as the file says."""
    second, at, frame = settled
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return "frame", (second, at, pixels)


def serve(pipe: Connection, path: str, options: dict) -> None:
    """Send what :func:`decode` yields into a pipe, then ("end", None) or ("error", exception)."""
    try:
        for message in decode(path, **options):
            pipe.send(message)
        pipe.send(("end", None))
    except (BrokenPipeError, KeyboardInterrupt):
        pass  # the parent is gone
    except SystemExit as error:
        pipe.send(("error", error))
    except Exception as error:  # the parent goes on with the next file
        if not isinstance(error, Skipped):
            error = Skipped(f"{path}: could not be decoded ({type(error).__name__}: {error})")
        pipe.send(("error", error))
