"""A genome's documents are its certain bases; training has both strands, validation and test one."""

import gzip

import numpy as np
import pytest

from data import CorpusError, InMemoryDocuments, prepare
from data.sources import BadDocuments, Genome
from data.tokenizers import Bytes
from tests.data.sources.rows import STRICT, by_name

FASTA = b""">one chromosome\r
acgtNNAC\r
GT\r
ryACC-G
>two empty

>three
TTTT
"""


@pytest.fixture
def genomes(tmp_path):
    folder = tmp_path / "genomes"
    for split in ("train", "valid"):
        (folder / split).mkdir(parents=True)
    (folder / "train" / "a.fna").write_bytes(FASTA)
    (folder / "valid" / "b.FA.gz").write_bytes(gzip.compress(b"AACC\nN\n"))
    return folder


def genome(reverse_complement: bool = False) -> Genome:
    return Genome((".fa", ".fna"), "name", reverse_complement)


def test_documents_are_runs_of_certain_bases(genomes, tmp_path, caplog):
    assert by_name(genome().load(str(genomes), tmp_path / "arrow", STRICT)) == {
        "train/a.fna:0": "ACGT",
        "train/a.fna:1": "ACGT",
        "train/a.fna:2": "ACC",
        "train/a.fna:3": "G",
        "train/a.fna:4": "TTTT",
        "valid/b.FA.gz:0": "AACC",
    }
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [warning.partition(" letters ")[0] for warning in warnings] == [
        "train/a.fna: 5 of 21",
        "valid/b.FA.gz: 1 of 5",
    ]


def test_training_reads_both_strands(genomes, tmp_path):
    splits = genome(True).load(str(genomes), tmp_path / "arrow", STRICT)
    assert splits["train"]["text"][:] == ["ACGT", "ACGT", "ACGT", "ACGT", "ACC", "GGT", "G", "C", "TTTT", "AAAA"]
    assert splits["train"]["name"][5] == "train/a.fna:2:reverse"
    assert splits["validation"]["text"][:] == splits["test"]["text"][:] == ["AACC"]
    assert genome(True).identity(str(genomes)) != genome(False).identity(str(genomes))


def test_a_protein_is_one_line_or_is_skipped(genomes, tmp_path):
    (genomes / "train" / "c.fa").write_bytes(b">protein of a\nACGTE\n>dna\nGG\n")
    with pytest.raises(
        CorpusError, match=r"must hold a sequence of DNA in train/c\.fa, record 0 \(protein of a\), and holds .*'E'"
    ):
        genome().load(str(genomes), tmp_path / "arrow", BadDocuments("error", str(genomes)))
    bad = BadDocuments("skip", str(genomes))
    documents = by_name(genome().load(str(genomes), tmp_path / "arrow2", bad))
    assert bad.count == 1 and documents["train/c.fa:1"] == "GG"


@pytest.mark.parametrize("text", ["ACGT\n", "ACNGT", "acgt"])
def test_a_text_that_is_no_fasta_file_has_the_four_letters_alone(genomes, tmp_path, text):
    source = Genome((".fa", ".fna", ".txt"), "name", True)
    (genomes / "train" / "c.txt").write_text("GGAC")
    assert by_name(source.load(str(genomes), tmp_path / "arrow", STRICT))["train/c.txt:reverse"] == "GTCC"
    (genomes / "train" / "c.txt").write_text(text)
    with pytest.raises(CorpusError, match=r"^data\.source\.extensions=\[.*\.txt'\]: must be .* train/c\.txt has '"):
        source.load(str(genomes), tmp_path / "again", STRICT)


def strains(seed: int, bases: int = 5000) -> tuple[str, str]:
    """A random sequence and a strain of it: 2 % of the bases differ, 300 are inserted, and the first 40 are missing."""
    generator = np.random.default_rng(seed)
    first = generator.choice(list("ACGT"), bases)
    second = np.where(generator.random(bases) < 0.02, generator.choice(list("ACGT"), bases), first)
    second = np.concatenate([second[40:2000], generator.choice(list("ACGT"), 300), second[2000:]])
    return "".join(first), "".join(second)


@pytest.fixture
def species(tmp_path):
    """Two strains of one species and a sequence of another for training, and two strains of a third for validation."""
    for number, split in enumerate(("train", "valid")):
        (tmp_path / "species" / split).mkdir(parents=True)
        for name, text in zip("ab", strains(number), strict=True):
            (tmp_path / "species" / split / f"{name}.fa").write_text(f">{name}\n{text}\n")
    (tmp_path / "species" / "train" / "other.fa").write_text(f">other\n{strains(2)[0]}\n")
    return tmp_path / "species"


def test_a_pair_is_a_region_and_its_like_in_another_strain(species, tmp_path):
    splits = Genome((".fa",), "name", False, (512, 1024)).load(str(species), tmp_path / "arrow", STRICT)
    names, texts = splits["train"]["name"][:], splits["train"]["text"][:]
    assert {tuple(part.split(":")[0] for part in name.split("+")) for name in names} == {
        ("train/a.fa", "train/b.fa"),
        ("train/b.fa", "train/a.fa"),
    }, "the other species shares nothing with them"
    assert {len(text) for text in texts} == {1024, 2048}
    assert {len(text) for text in splits["validation"]["text"][:]} == {2048}, "the longest alone"
    documents = dict(zip(names, texts, strict=True))
    text = documents["train/a.fa:0:0+train/b.fa:0:0:512"]
    assert text[:512] == strains(0)[0][:512], "the region begins 40 bases before the strain does"
    text = documents["train/a.fa:0:512+train/b.fa:0:472:512"]
    same = np.mean([one == other for one, other in zip(text[:512], text[512:], strict=True)])
    assert same > 0.95, "all but the changed bases"
    assert documents["train/a.fa:0:3072+train/b.fa:0:3332:1024"], "behind the insertion"


def test_pairs_are_read_on_both_strands_and_belong_to_the_corpus(species, tmp_path):
    source = Genome((".fa",), "name", True, (1024,))
    (first, reverse, *_) = source.load(str(species), tmp_path / "arrow", STRICT)["train"]["text"][:]
    assert reverse == first.translate(str.maketrans("ACGT", "TGCA"))[::-1]
    assert source.identity(str(species)) != Genome((".fa",), "name", True, (512,)).identity(str(species))
    assert "pairs" not in Genome((".fa",), "name", True).identity(str(species)), "as before there were pairs"


@pytest.mark.parametrize("length", [2048, 8192])
def test_a_split_without_pairs_is_one_line(species, tmp_path, length):
    (species / "valid" / "b.fa").write_text(f">b\n{strains(3)[0]}\n")
    error = (
        rf"^data\.source\.pairs=\[{length}\]: must be .* and {'validation' if length == 2048 else 'train'} has none of"
    )
    with pytest.raises(CorpusError, match=error):
        Genome((".fa",), "name", False, (length,)).load(str(species), tmp_path / "arrow", STRICT)


def test_one_sequence_is_divided_into_the_splits(tmp_path):
    sequence = "ACGGT" * 4
    (tmp_path / "one.fa").write_text(f">one\n{sequence}\n")
    (tmp_path / "two.fa").write_text(">two\nA\n")  # too short for three parts
    source = Genome((".fa",), "name", True, parts=(0.7, 0.1, 0.2))
    splits = source.load(str(tmp_path), tmp_path / "arrow", STRICT)
    assert by_name(splits)["one.fa:0:reverse"] == sequence[:14].translate(str.maketrans("ACGT", "TGCA"))[::-1]
    of_one = {split: [text for text in rows["text"][:] if text in sequence] for split, rows in splits.items()}
    assert of_one["train"][0] == sequence[:14] and of_one["validation"] == [sequence[14:16]]
    assert of_one["test"] == [sequence[16:]]
    assert source.identity(str(tmp_path)) != Genome((".fa",), "name", True).identity(str(tmp_path))
    assert "parts" not in Genome((".fa",), "name", True).identity(str(tmp_path)), "as before there were parts"
    for each in (source, Genome((".fa",), "name", False, parts=(0.7, 0.1, 0.2))):  # one's own genome is scored whole
        documents = InMemoryDocuments.load(each, str(tmp_path), Bytes(), "error", "test")
        assert sorted(documents.text(n) for n in range(len(documents))) == ["A", sequence]


def test_a_genome_of_one_sequence_is_refused_with_what_divides_it(tmp_path):
    (tmp_path / "one.fa").write_text(f">one\n{'ACGGT' * 400}\n")
    with pytest.raises(
        CorpusError, match=r"the validation split has none .*; 'data\.source\.parts=\[0\.9,0\.05,0\.05\]"
    ):
        prepare(Genome((".fa",), "name", True), str(tmp_path), Bytes(), 1, tmp_path / "cache", "error")


def test_parts_that_cannot_divide_are_refused(genomes):
    for parts, others in (((0.5, 0.1, 0.1), {}), ((0.8, 0.1, 0.1), {"pairs": (512,)})):
        with pytest.raises(CorpusError, match=r"^data\.source\.parts=\[.*\]: must be "):
            Genome((".fa",), "name", True, parts=parts, **others)
    with pytest.raises(CorpusError, match=r"^data\.source\.parts=\[0\.8, 0\.1, 0\.1\]: must be null .* folder train/"):
        Genome((".fa", ".fna"), "name", True, parts=(0.8, 0.1, 0.1)).check(str(genomes))


def test_ones_own_genome_is_scored_on_one_strand(genomes):
    documents = InMemoryDocuments.load(genome(True), str(genomes), Bytes(), "error", "test")
    texts = [documents.text(n) for n in range(len(documents))]
    assert texts == ["ACGT", "ACGT", "ACC", "G", "TTTT", "AACC"]
