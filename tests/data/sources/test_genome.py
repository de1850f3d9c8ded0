"""A genome's documents are its certain bases; training has both strands, validation and test one."""

import gzip

import pytest

from data import CorpusError
from data.sources import BadDocuments, Genome
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
    assert [record.getMessage().partition(" letters ")[0] for record in caplog.records] == [
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
    with pytest.raises(CorpusError, match=r"must hold .* in train/c\.fa, record 0 \(protein of a\), and holds .*'E'"):
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
