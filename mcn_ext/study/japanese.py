"""``--language ja``: labels of figures and tables in Japanese, for slides and theses."""

from __future__ import annotations

import re

NAME = r"[A-Za-z0-9_./-]"  # of a run, a file
# Regular expressions -> Japanese, in this order: whole phrases before the words in them.
PHRASES = {
    r"Best order by (.+) R@10, %": r"R@10 が最も高い順序 (\1、%)",
    r"(.+) R@10 minus that of (.+), points": r"R@10、\2 との差 (\1、ポイント)",
    r"([+-][\d.]+) over (\w+)": r"\2 との差 \1",
    r"(\d+)% of clips misaligned": r"ずれたクリップの割合 \1%",
    r"R@10, row minus column": "R@10、行 − 列",
    r"best two-stage order": "二段階で最良の順序",
    r"its margin over the next": "2 位との差",
    r"predicted by": "予測の指標",
    r"measured order": "測定された順序",
    r"tau of (\w+)": r"\1 の τ",
    r"first minus second": "前者 − 後者",
    r"all others": "その他すべて",
    r"effective rank: ": "実効ランク: ",
    r"no video": "映像なし",
    r"R@10 higher by, points": "R@10 の差 (ポイント)",
    r"cleaner by": "指標の差 (大きいほどノイズが少ない)",
    r"found first": "1 位",
    r"query -> candidates": "クエリ → 候補",
    r"difference, simultaneous 95 % interval|difference \(95 %\)": "差 (95 % 同時信頼区間)",
    r"change \(95 % interval\)": "変化 (95 % 信頼区間)",
    r"R@10 after stage 1": "第一段階後の R@10",
    r"after stage 2": "第二段階後",
    r"p \(step-down\)": "p 値 (ステップダウン)",
    r"one stage, (\d+) epochs?": r"一段階、\1 エポック",
    r"([AVT]+) then ([AVT])\b": r"\1 → \2",
    r"contrastive loss": "対照損失",
    r"training seconds": "学習時間 (秒)",
    r"training FLOPs": "学習の FLOPs",
    r"steps skipped": "スキップしたステップ数",
    r"live clusters": "使用中のクラスタ数",
    r"largest cluster": "最大のクラスタ",
    r"video noise": "映像のノイズ",
    r"audio noise": "音声のノイズ",
    r"gap (\w+), (\w+)": r"ギャップ (\1・\2)",
    r"matched (\w+), (\w+)": r"対応する類似度 (\1・\2)",
    r"within (video|audio|text)": r"内部の類似度 (\1)",
    r"equal in": "等しい条件",
    r"(\d+) of (\d+)": r"\1/\2",
    r"two stages": "二段階",
    r"one stage": "一段階",
    r"stage (\d)": r"第 \1 段階",
    r"search by": "統合方法",
    r" alone\b": "のみ",
    r"two minus one": "二段階 − 一段階",
    r" minus ": " − ",
    r"->": "→",
}
WORDS = {
    "text": "テキスト",
    "video": "映像",
    "audio": "音声",
    "frozen": "固定",
    "finetune": "微調整",
    "finetuned": "微調整",
    "sum": "和",
    "mean": "平均",
    "bank": "バンク",
    "chance": "チャンスレベル",
    "method": "手法",
    "study": "実験",
    "seeds": "シード数",
    "epoch": "エポック",
    "epochs": "エポック",
    "clips": "クリップ数",
    "higher": "高い順序",
    "lower": "低い順序",
    "detectable": "検出可能な差",
    "direction": "方向",
    "words": "単語の情報量",
    "mixed": "モダリティの混ざり具合",
    "query": "クエリ",
    "rank": "順位",
    "second": "2 位",
    "third": "3 位",
    "probe": "指標",
    "predicted": "予測",
    "measured": "測定",
    "cell": "設定",
    "tau": "τ",
    "of": "比較",
    "differs": "異なるフラグ",
    "value": "値",
    "in": "該当する手法・段階",
    "order": "順序",
    "data": "データ",
}


def font() -> dict:
    """matplotlib's settings for a Japanese font; SystemExit without the package that has it."""
    try:
        import matplotlib

        with matplotlib.rc_context():  # it also makes its font that of all figures
            import matplotlib_fontja
    except ImportError:
        raise SystemExit("--language ja: pip install matplotlib-fontja (a Japanese font)") from None
    return {"font.family": matplotlib_fontja.matplotlib_fontja.FONT_NAME}


def translate(text: str) -> str:
    """A label in Japanese, part by part (between commas). A part with an English word that is not
    listed here stays as it is: a name of yours, a caption, a path."""
    whole = _translate(text)
    return whole if whole is not None else ", ".join(_translate(p) or p for p in text.split(", "))


def _translate(text: str) -> str | None:
    for english, japanese in PHRASES.items():
        text = re.sub(english, japanese, text)
    text = re.sub(rf"(?<!{NAME})[a-z]+(?!{NAME})", lambda m: WORDS.get(m[0], m[0]), text)
    return None if re.search("[a-z]{2}", text) else text


def label(figure) -> None:
    """Translate all texts of a matplotlib figure."""
    from matplotlib.text import Text
    from matplotlib.ticker import FixedLocator

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_locator(), FixedLocator):  # names, not numbers
            names = [translate(text.get_text()) for text in axis.get_ticklabels()]
            axis.set_ticks(axis.get_majorticklocs(), names)
    for text in figure.findobj(Text):
        text.set(text=translate(text.get_text()), fontweight="normal")  # the font has no bold
