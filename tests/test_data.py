"""Sampling, batches, word vectors, metrics."""

import numpy as np
import pytest
import torch

from mcn_ext.data.clips import (
    ClipReader,
    ClipSampler,
    TrainingClips,
    caption_span,
    collate,
    draw_bags,
    draw_spans,
    make_loader,
    perturb_voice,
    to_device,
)
from mcn_ext.data.store import Store
from mcn_ext.data.words import WordVectors, tokenize, train_vectors, vectors_for
from mcn_ext.evaluation.metrics import markdown, ranks, summarize, table_rows
from tests.conftest import WORDS

VECTORS = WordVectors(WORDS, np.eye(len(WORDS)), "test")


def test_span_grows_by_the_nearer_neighbour():
    start, end = np.array([0.0, 10.0, 12.0, 30.0]), np.array([3.0, 11.0, 14.0, 31.0])
    assert caption_span(start, end, 1, 0.5) == (1, 1)
    assert caption_span(start, end, 1, 2.0) == (1, 2)
    assert caption_span(start, end, 1, 5.0) == (0, 2)
    assert caption_span(start, end, 3, 10.0) == (2, 3)
    assert caption_span(start, end, 0, 1e9) == (0, 3)  # the whole video is all there is


def test_clips_differ_while_there_are_enough_and_repeat_with_the_same_id():
    start = np.arange(5) * 10.0
    spans = draw_spans(start, start + 5, 5, 1.0, np.random.default_rng(0))
    assert len(set(spans)) == 5
    spans = draw_spans(start, start + 5, 12, 1.0, np.random.default_rng(0))
    assert len(spans) == 12 and len(set(spans)) == 5
    # Captions that grow into the same clip are that clip once.
    assert len(set(draw_spans(start, start + 5, 5, 1e9, np.random.default_rng(0)))) == 1


def test_bags_are_neighbours_in_time_and_any_two_meet():
    start, met = np.arange(9) * 10.0, set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        spans = draw_spans(start, start + 5, 9, 1.0, rng)
        spans.append(spans[3])  # a clip that is there twice
        first = draw_bags(spans, 4, rng)
        bags = {
            i: [a for (a, _), bag in zip(spans[:9], first, strict=False) if bag == i] for i in first
        }
        assert first[9] == first[3] and sum(map(len, bags.values())) == 9
        in_time = sorted(map(sorted, bags.values()))
        assert sum(in_time, []) == list(range(9)), "each bag is without a gap"
        assert all(len(bag) == 4 for bag in in_time[1:-1]) and max(map(len, in_time)) <= 4
        assert all(min(clips) == spans[i][0] for i, clips in bags.items()), "called by its first"
        met |= {(a, a + 1) for bag in in_time for a in bag[:-1]}
    assert met == {(a, a + 1) for a in range(8)}


def test_bags_do_not_change_the_clips(store_path):
    reader = ClipReader(Store(store_path), "AV", audio_frames=100, audio_augment=1.0)
    settings = dict(n_pair=6, min_time=1.0, seed=0)
    plain, bagged = (
        TrainingClips(reader, **settings),
        TrainingClips(reader, **settings, n_candidates=3),
    )
    for video in range(4):
        a, b = plain[2, video], bagged[2, video]
        bags = b.pop("bag_id")
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        assert bags.dtype == np.int64 and 2 <= len(set(bags)) <= 3 and set(bags) < set(b["clip_id"])


def test_reader_cuts_and_marks_what_is_not_there(store_path):
    store = Store(store_path)
    reader = ClipReader(
        store, "AV", video_streams=("2d", "3d"), words=VECTORS, audio_frames=150, max_words=2
    )
    out = reader.read(0, [(1, 1), (2, 3)])
    rows = store.clips(0, "2d", [2.0], [3.9])[0]
    assert len(rows) == 2  # int(2.0 * 1) : int(3.9 * 1) + 1
    np.testing.assert_array_equal(out["video.2d"][0], rows.astype(np.float32).max(0))
    np.testing.assert_array_equal(
        out["audio"][0, :, :150].T, store.clips(0, "mel", [2.0], [3.9])[0][:150].astype(np.float32)
    )
    assert (
        out["n_frames"].tolist() == [150, 150]
        and out["valid.audio"].all()
        and out["valid.text"].all()
    )
    assert (out["words"][0] >= 0).sum() == 1 and (out["words"][1] >= 0).sum() == 2
    silent = reader.read(4, [(0, 0)])  # the store's fifth video has no sound
    assert not silent["valid.audio"].any() and silent["n_frames"][0] == 0
    unknown = ClipReader(store, words=WordVectors(["zebra"], np.eye(1), "")).read(0, [(0, 0)])
    assert not unknown["valid.text"].any()


def test_constant_and_broken_sound_is_not_valid(tmp_path):
    from mcn_ext.data.store import StoreWriter
    from tests.conftest import STREAMS

    writer = StoreWriter(tmp_path / "s.h5", STREAMS, "test")
    mel = np.full((400, 40), -80.0)
    mel[100:200] = np.random.default_rng(0).normal(-40, 10, (100, 40))
    mel[300, 7] = np.nan
    video = np.ones((4, 12))
    video[1, 3] = np.inf
    writer.add(
        "a",
        {"2d": video, "3d": np.zeros((6, 6)), "mel": mel},
        [0, 1, 2, 3],
        [0.9, 1.9, 2.9, 3.9],
        list("abcd"),
    )
    reader = ClipReader(Store(writer.close()), "AV", video_streams=("2d",))
    out = reader.read(0, [(i, i) for i in range(4)])
    assert out["valid.audio"].tolist() == [False, True, False, False]
    assert out["valid.video"].tolist() == [True, False, True, True]
    assert all(np.isfinite(a).all() for a in out.values())


def test_caption_id_is_that_of_the_known_words():
    reader = ClipReader(None, "T", words=VECTORS)
    ids = reader.look_up(["chop the onion", "onion, chop chop", "chop the egg"])["caption_id"]
    assert ids[0] == ids[1] != ids[2]


def test_batches_depend_on_seed_epoch_and_video_alone(store_path):
    def batches(workers, epoch, start=0, seed=0):
        reader = ClipReader(
            Store(store_path),
            "AV",
            video_streams=("2d",),
            words=VECTORS,
            audio_frames=100,
            audio_augment=1.0,
        )
        clips = TrainingClips(reader, n_pair=3, min_time=1.0, seed=seed)
        sampler = ClipSampler(len(clips), 4, seed)
        sampler.set_epoch(epoch, start)
        return list(make_loader(clips, sampler, workers, torch.device("cpu")))

    here, elsewhere = batches(0, 1), batches(2, 1)
    assert len(here) == len(elsewhere) == 2
    for a, b in zip(here, elsewhere, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    resumed = batches(0, 1, start=1)
    assert len(resumed) == 1 and torch.equal(resumed[0]["clip_id"], here[1]["clip_id"])
    assert not torch.equal(batches(0, 2)[0]["clip_id"], here[0]["clip_id"])
    assert not torch.equal(batches(0, 1, seed=1)[0]["clip_id"], here[0]["clip_id"])


def test_collate_pads_audio_and_to_device_looks_words_up():
    items = [
        {
            "audio": np.ones((len(words), 40, frames), np.float32),
            "words": np.array(words),
            "valid.audio": np.full(len(words), valid),
            "video.2d": np.zeros((len(words), 3), np.float32),
        }
        for frames, words, valid in ((20, [[0, -1], [1, 0]], True), (33, [[-1, -1]], False))
    ]
    batch = collate(items)
    assert batch["audio"].shape == (3, 40, 48) and batch["audio"][0, 0].sum() == 20
    moved = to_device(batch, torch.device("cpu"), torch.eye(2))
    mask = [[True, False], [True, True], [False, False]]
    assert moved["text"].shape == (3, 2, 2) and moved["text_mask"].tolist() == mask
    assert moved["video"]["2d"].shape == (3, 3)
    assert moved["valid"]["audio"].tolist() == [True, True, False]


@pytest.mark.slow
def test_words_from_every_format_agree(tmp_path, store_path, caplog):
    models = pytest.importorskip("gensim.models")
    store = Store(store_path)
    keyed = models.KeyedVectors(5)
    keyed.add_vectors(
        [*WORDS, "unused"],
        np.random.default_rng(0).normal(size=(len(WORDS) + 1, 5)).astype(np.float32),
    )
    keyed.save_word2vec_format(tmp_path / "v.bin", binary=True)
    keyed.save_word2vec_format(tmp_path / "v.txt", binary=False)
    keyed.save(str(tmp_path / "v.kv"))
    cache = tmp_path / "cache.npz"
    binary = vectors_for(store, tmp_path / "v.bin", cache)
    assert binary.words == sorted(WORDS) and cache.exists()
    np.testing.assert_array_equal(binary.vectors, [keyed[w] for w in binary.words])
    assert vectors_for(store, tmp_path / "v.bin", cache).source == binary.source
    for name in ("v.txt", "v.kv"):
        np.testing.assert_allclose(
            vectors_for(store, tmp_path / name, None).vectors, binary.vectors, rtol=1e-5
        )
    text = (tmp_path / "v.txt").read_text().splitlines()
    at = next(i for i, line in enumerate(text) if line.startswith("boil "))
    text[at] = "boil 1 2 nan 4 5"
    (tmp_path / "holed.txt").write_text("\n".join(text) + "\n")
    with caplog.at_level("WARNING"):
        holed = vectors_for(store, tmp_path / "holed.txt", None)
    assert holed.words == sorted(set(WORDS) - {"boil"}) and np.isfinite(holed.vectors).all()
    assert "vectors of 1 words are not finite and are left out: boil" in caplog.text
    (tmp_path / "broken.bin").write_bytes(b"not vectors")
    with pytest.raises(SystemExit, match="broken.bin: not word vectors"):
        vectors_for(store, tmp_path / "broken.bin", None)


@pytest.mark.slow
def test_trained_vectors_repeat(store_path):
    pytest.importorskip("gensim")
    a, b = (train_vectors(Store(store_path), dim=20) for _ in range(2))
    assert a.words == b.words and {"now", "it"} <= set(a.words)
    np.testing.assert_array_equal(a.vectors, b.vectors)


def test_tokenize_keeps_case_and_apostrophes():
    assert tokenize("Don't peel the Egg-plant, 2x!") == [
        "Don't",
        "peel",
        "the",
        "Egg",
        "plant",
        "2x",
    ]


# ------------------------------------------------------------------------------------ metrics


def test_rank_rule():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.8, 0.1], [0.5, 0.5, 0.5]])
    assert ranks(similarity).tolist() == [1.0, 1.5, 2.0]
    assert ranks(similarity, torch.tensor([2, 2, 0])).tolist() == [2.0, 3.0, 2.0]


def test_collapsed_model_scores_chance_not_perfect():
    rank = ranks(torch.ones(100, 100))
    assert (rank == 50.5).all()
    assert summarize(rank)["R@10"] == 0


def test_non_finite_scores_are_an_error():
    bad = torch.zeros(3, 3)
    bad[1, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="1 of 9"):
        ranks(bad)


def test_summary_of_known_ranks_and_interval():
    rank = np.array([1.0] * 20 + [3.0] * 30 + [8.0] * 10 + [70.0] * 40)
    s = summarize(rank)
    assert (s["R@1"], s["R@5"], s["R@10"], s["MedR"]) == (20.0, 50.0, 60.0, 5.5)
    low, high = s["R@1_ci95"]
    # Binomial: 20 +- 1.96 * 4
    assert 10 < low < 14 and 26 < high < 30
    assert summarize(rank) == s
    table = markdown(*table_rows({"text->video": s}, 100))
    assert "| text->video | 20.0 |" in table and "n = 100" in table


# ----------------------------------------------------------------------------- the scripts' parts


def test_missing_clips_are_misses():
    from mcn_ext.evaluation import retrieval

    eye = torch.eye(4)
    embeddings = {"text": eye, "audio": eye.clone(), "video": eye.clone()}
    valid = {m: torch.ones(4, dtype=torch.bool) for m in embeddings}
    valid["audio"][2] = False
    rank = retrieval.Scores((embeddings, valid), "text->audio").ranks()
    assert rank.tolist() == [1, 1, 4, 1]  # a silent clip is not found, and nobody's first answer
    rank = retrieval.Scores((embeddings, valid), "text->video+audio").ranks()
    assert rank.tolist() == [1, 1, 1, 1]  # its video still speaks for it
    valid["text"][0] = False
    rank = retrieval.Scores((embeddings, valid), "text->video").ranks()
    assert rank.tolist() == [4, 1, 1, 1]  # a query without a known word finds nothing
    embeddings["video"][1, 1] = float("nan")
    with pytest.raises(FloatingPointError):
        retrieval.Scores((embeddings, valid), "text->video").ranks()


def test_perturbed_voice_is_another_but_alike():
    rng = np.random.default_rng(0)
    mel = np.repeat(rng.uniform(-70, 0, (30, 40)), 10, axis=0).astype(np.float32)
    lengths = set()
    for _ in range(20):
        out = perturb_voice(mel, rng, 1.0)
        lengths.add(len(out))
        assert out.dtype == np.float32 and out.shape[1] == 40 and np.isfinite(out).all()
        assert 0.8 <= len(out) / len(mel) <= 1.25
    assert len(lengths) > 10
    np.testing.assert_array_equal(perturb_voice(mel, rng, 0.0), mel)
    assert perturb_voice(mel[:1], rng, 1.0).shape == (1, 40)


def test_vectors_of_another_file_are_noticed():
    other = WordVectors(WORDS[:3] + ["new"], np.eye(4, len(WORDS)), "other")
    assert VECTORS.agrees(other)
    other.vectors[1] += 1
    assert not VECTORS.agrees(other)
    assert not VECTORS.agrees(WordVectors(WORDS, np.eye(len(WORDS), 9), "wider"))
