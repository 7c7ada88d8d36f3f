"""Directions, fusions and ranks."""

import torch

from mcn_ext.data.store import Store
from mcn_ext.evaluation import retrieval
from mcn_ext.evaluation.metrics import keep
from mcn_ext.reference import volume


def rank(*of, **how):
    """(scores of all queries against all candidates, ranks)."""
    made = retrieval.Scores(*of, **how)
    return made.scores(slice(None)), made.ranks()


def there(*names, n):
    return {name: torch.ones(n, dtype=torch.bool) for name in names}


def test_every_direction_once_the_customary_ones_first():
    def asked(*settings):
        return [direction for direction, _ in retrieval.asked(*settings)]

    found = asked(["audio", "video", "text"], ["sum"], True)
    assert tuple(found[:4]) == retrieval.MAIN and len(found) == len(set(found)) == 12
    assert {"video+audio->text", "audio->video+text", "audio+text->video"} < set(found)
    assert asked(["audio", "video"], ["sum"], True) == ["audio->video", "video->audio"]
    assert asked(["audio", "video"], ["sum", "mean"]) == ["audio->video"]


def test_results_of_the_same_settings_add_up_and_of_others_are_kept():
    metrics, about = (
        {},
        {"n": 4, "data": "a.h5", "checkpoint": "c.pt", "step": 8, "similarity": "cosine"},
    )
    keep(metrics, "youcook2", about | {"text->video": 1, "text->audio": 2})
    keep(metrics, "youcook2", about | {"text->video+audio (mean)": 3, "text->audio": 4})
    whole = about | {"text->video": 1, "text->audio": 4, "text->video+audio (mean)": 3}
    assert metrics == {"youcook2": whole}
    for key, value in (("similarity", "dot"), ("step", 9), ("n", 5)):
        about[key] = value
        keep(metrics, "youcook2", about | {"text->video": 5})
        assert metrics["youcook2"] == about | {"text->video": 5}
    assert metrics["replaced"][0] == {"set": "youcook2"} | whole and len(metrics["replaced"]) == 3


def test_the_mean_does_not_favour_clips_whose_modalities_agree():
    """Clip 1's video and sound say the same, so its sum is long and beats clip 0, both of whose
    modalities are as near to the query, from two sides."""
    near = torch.tensor([1.0, 0.6, 0.0]), torch.tensor([1.0, -0.6, 0.0])
    other = torch.tensor([1.0, 0.0, 0.5])
    clips = (
        {
            "text": torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]),
            "video": torch.stack([near[0], other]),
            "audio": torch.stack([near[1], other]),
        },
        there("text", "video", "audio", n=2),
    )
    _, by_sum = rank(clips, "text->video+audio")
    scores, by_mean = rank(clips, "text->video+audio", fusion="mean")
    assert by_sum.tolist() == [2, 1] and by_mean.tolist() == [1, 1]
    torch.testing.assert_close(scores[0, 0], torch.tensor(1.0))


def test_the_bank_takes_off_what_draws_any_query():
    """Candidate 1 is near to everything (a hub): the bank's queries say so. Worked by hand."""
    text = torch.eye(3)
    video = torch.tensor([[1.0, 0, 0], [0.8, 0.9, 0.8], [0, 0, 1.0]])
    clips = {"text": text, "video": video}, there("text", "video", n=3)
    bank = {"text": text[[0, 2]]}, there("text", n=2)
    plain, _ = rank(clips, "text->video", "dot")
    scores, ranks = rank(clips, "text->video", "dot", "bank", bank, temperature=0.5)
    expected = 2 * plain - (2 * plain[[0, 2]]).exp().sum(0).log()
    torch.testing.assert_close(scores, expected)
    assert ranks.tolist() == [1, 1, 1]
    worse = video.clone()
    worse[1] = torch.tensor([1.1, 0.9, 1.1])  # now it is first for all, but for the bank
    clips = {"text": text, "video": worse}, clips[1]
    assert rank(clips, "text->video", "dot")[1].tolist() == [2, 1, 2]
    assert rank(clips, "text->video", "dot", "bank", bank, temperature=0.5)[1].tolist() == [1, 1, 1]


def test_the_volume_is_the_references_and_of_what_is_there():
    g = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(20, 5, generator=g).double() for name in ("text", "video", "audio")}
    rows["audio"][3] = rows["video"][3] * 2  # the two agree: nothing is left to rank by
    valid = there(*rows, n=20)
    scores, ranks = rank((rows, valid), "text->video+audio", "dot", "volume")
    expected = volume(*(rows[name] for name in ("text", "video", "audio")))
    torch.testing.assert_close(scores, -expected, atol=1e-7, rtol=1e-9)
    assert (scores[:, 3] > -1e-7).all() and ranks[3] == 1
    valid["audio"][5] = False
    scores, _ = rank((rows, valid), "text->video+audio", fusion="volume")
    area = volume(rows["text"], rows["video"][5:6])
    torch.testing.assert_close(scores[:, 5:6], -area, atol=1e-7, rtol=1e-9)
    valid["video"][5] = False
    assert (rank((rows, valid), "text->video+audio", fusion="volume")[0][:, 5] == -torch.inf).all()
    wanted = retrieval.asked(rows, ["volume"])
    assert wanted == [("text->video+audio", "volume")]


def test_clips_of_the_bank_come_from_all_over_the_store(store_path):
    store = Store(store_path)
    clips = retrieval.some_clips(store, 6, 0.0)
    assert sum(len(spans) for _, spans in clips) == 6 and len({v for v, _ in clips}) == 6
    assert clips[0][0] == 0 and clips[-1][0] == len(store) - 1
    assert sum(len(spans) for _, spans in retrieval.some_clips(store, 25, 0.0)) == 25
