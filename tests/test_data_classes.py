"""Class lists, texts and ids: one rule for every form of a dataset."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
from timm.data import ImageNetInfo

from saebench.data.classes import Found, Listed, class_list, numbers
from saebench.data.imagenet import ImageNet, lemmas, wnids
from saebench.data.images import make_ids, without_suffix
from saebench.data.inat21 import COUNT, RANKS, INat21
from saebench.data.templates import templates_of
from saebench.errors import DataError, SpecError
from saebench.specs import DatasetSpec
from tests.image_collections import SPECIES

SPEC = DatasetSpec(name="toy", source="images")


# ImageNet


def test_imagenets_order_is_timms_and_its_names_are_open_clips():
    info = ImageNetInfo("imagenet-1k")
    assert list(wnids()) == info.label_names() == sorted(wnids())
    assert lemmas()[0] == info.label_descriptions(detailed=True)[0].partition(":")[0]
    classes = class_list(replace(SPEC, classes="imagenet-1k"), [], None)
    assert classes.names == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert classes.texts == {"default": tuple(open_clip.IMAGENET_CLASSNAMES)}


def test_imagenets_classes_by_every_name():
    classes = ImageNet()
    for label in (0, 134, 517, 963, 999):
        assert classes.number(wnids()[label]) == label
        assert classes.number(label) == classes.number(str(label)) == label
    assert classes.number("tench, Tinca tinca") == classes.number("tench") == 0
    assert classes.number("n01751748 111 108 330 230") == wnids().index("n01751748")
    assert classes.number("pizza") == 963
    # Two birds' and machines' names that say nothing; numbers and ids there are not.
    for name in ("crane", "missile", "unicorn", "n00000000", "n014407640", 1000, -1, "1000"):
        assert classes.number(name) is None, name
    cleaned = open_clip.IMAGENET_CLASSNAMES
    shared = [  # one class by this list, and another by that
        label
        for label, name in enumerate(lemmas())
        if {i for names in (lemmas(), cleaned) for i, other in enumerate(names) if other == name}
        != {label}
    ]
    assert 134 in shared
    assert len(shared) < 20
    assert [label for label, name in enumerate(lemmas()) if classes.number(name) != label] == shared


def test_manifests_need_no_torch(tmp_path: Path):
    script = (
        "import sys; from saebench.data.classes import class_list, numbers\n"
        "from saebench.specs import DatasetSpec\n"
        "spec = DatasetSpec(name='x', source='images', classes='imagenet-1k')\n"
        "labels = numbers(class_list(spec, [], None), ['n01440764', 'n07873807'], '')\n"
        "assert labels.tolist() == [0, 963]\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


# iNaturalist


def test_a_part_of_inat_has_the_numbers_of_the_whole():
    classes = INat21(SPECIES[1:], None)
    assert numbers(classes, SPECIES[1:], "").tolist() == [5, 9990]
    assert len(classes.names) == COUNT
    assert classes.names[5] == "Atypoides riversi"
    assert classes.names[9990] == "Plantago novae-angliae"
    assert classes.names[7] == "species 00007"
    assert classes.texts == {}, "texts of a part would make another classifier"
    assert classes.number("Atypoides riversi") == classes.number("5") == classes.number(5) == 5
    assert classes.number("Homo sapiens") is None
    assert classes.number(COUNT) is None


def test_ranks_are_levels():
    classes = INat21(SPECIES, None)
    assert tuple(classes.levels) == RANKS
    for folder in SPECIES:
        number, *ranks = folder.split("_")[:7]
        for rank, name in zip(RANKS, ranks, strict=True):
            names, values = classes.levels[rank]
            assert names[values[int(number)]] == name
    assert classes.levels["kingdom"][0] == ("Animalia", "Plantae")


def test_one_name_in_two_kingdoms_is_two_values():
    birds = "00001_Animalia_Chordata_Aves_Passeriformes_Muscicapidae_Oenanthe_oenanthe"
    plants = "00002_Plantae_Tracheophyta_Magnoliopsida_Apiales_Apiaceae_Oenanthe_crocata"
    names, values = INat21([birds, plants], None).levels["genus"]
    assert len(names) == 2
    assert values[1] != values[2]
    assert names[values[2]].startswith("Oenanthe (Plantae")


def test_labels_without_taxonomy_are_an_unknown_value():
    assert INat21([3, 4], None).levels == {}
    names, values = INat21([SPECIES[0], 3], None).levels["kingdom"]
    assert (names[values[0]], names[values[3]]) == ("Animalia", "unknown")


def table(path: Path, categories: list[dict], before: int = 3) -> None:
    images = [{"id": i, "file_name": f"val/{SPECIES[0]}/{i}.jpg"} for i in range(before)]
    annotations = [{"id": i, "image_id": i, "category_id": 0} for i in range(before)]
    info = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    path.write_text(json.dumps(info))


def category(number: int, common: str = "") -> dict:
    ranks = ("Animalia", "Chordata", "Aves", "Passeriformes", f"Family {number // 100}", "Genus")
    return {
        "id": number,
        "name": f"Genus epithet{number}",
        "common_name": common,
        "supercategory": "Birds",
        **dict(zip(RANKS, ranks, strict=True)),
        "specific_epithet": f"epithet{number}",
        "image_dir_name": f"{number:05d}_…",
    }


def test_common_names_come_from_the_official_table(tmp_path: Path):
    all_of_them = [category(number) for number in range(COUNT)]
    all_of_them[7]["common_name"] = "Bird [seventh]"
    table(tmp_path / "train_mini.json", all_of_them)
    classes = INat21([SPECIES[0]], tmp_path)
    texts = classes.texts
    assert list(texts) == ["default", "scientific", "taxonomic", "common"]
    assert texts["default"] == texts["scientific"] == classes.names
    assert texts["scientific"][7] == "Genus epithet7"
    assert texts["taxonomic"][7] == ("Animalia Chordata Aves Passeriformes Family 0 Genus epithet7")
    assert texts["common"][7] == "Bird [seventh]"
    assert texts["common"][8] == "Genus epithet8", "without a common name: the scientific one"
    assert len(classes.levels["family"][0]) == 100


def test_with_the_table_a_part_has_the_levels_of_the_whole(tmp_path: Path):
    """Without it, values are numbered among those that are there: the page says so."""
    all_of_them = [category(number) for number in range(COUNT)]
    folders = [
        "_".join([f"{one['id']:05d}", *(one[rank] for rank in RANKS), one["specific_epithet"]])
        for one in all_of_them
    ]
    whole, part = INat21(folders, None).levels["family"], INat21(folders[500:], None)
    assert whole[0].index("Family 5") != part.levels["family"][0].index("Family 5")
    table(tmp_path / "val.json", all_of_them)
    names, values = INat21(folders[500:], tmp_path).levels["family"]
    assert names == whole[0]
    assert np.array_equal(values, whole[1])


def test_a_damaged_table_is_named(tmp_path: Path):
    for text in ('{"images": []}', '{"categories": [{"id": 0}]}', '{"categories": [{"id": 0,'):
        (tmp_path / "val.json").write_text(text)
        with pytest.raises(DataError, match=r"val\.json"):
            INat21([], tmp_path)


# Names that are found


def test_names_are_sorted_and_numbers_stay():
    found = Found(["dog", "cat", "ant_lion", "dog"])
    assert found.names == ("ant_lion", "cat", "dog")
    assert found.texts == {"default": ("ant lion", "cat", "dog")}
    assert [found.number(name) for name in ("cat", "cow", 3)] == [1, None, None]
    assert Found(["10", "9", "0"]).names == ("0", "9", "10")
    assert Found(["10", "9", "a"]).names == ("10", "9", "a")
    counted = Found([7, 2])
    assert counted.names == tuple("01234567")
    assert (counted.number(7), counted.number(8), counted.texts) == (7, None, {})
    with pytest.raises(DataError, match=r"numbers \(3\) and some are names \('cat'\)"):
        Found([3, "cat"])


def test_numbers_that_number_no_classes():
    for given in ([20210412000, 3], [2**62], [*range(999), 100_000]):
        with pytest.raises(DataError, match=f"toy.*the largest is {max(given)}:") as error:
            class_list(SPEC, given, None)
        assert "classes = [" in error.value.hint
    assert len(Found([7, 21_840]).names) == 21_841, "a part of ImageNet-21k"
    assert len(Found([*range(0, 200_000, 50)]).names) == 199_951
    by_name = Listed(["20210412000", "5"])
    assert [by_name.number(name) for name in (5, "5", 20210412000, 0, 1)] == [1, 1, 0, None, None]
    by_place = Listed(["3", "8"])
    assert [by_place.number(name) for name in (0, 1, 3, "3")] == [0, 1, None, 0]


def test_what_is_no_class_is_named():
    with pytest.raises(DataError, match=r"here: 'lost\+found' and 1 more is not one of the 2"):
        numbers(Found(["a", "b"]), ["a", "lost+found", "x"], "here")
    with pytest.raises(SpecError, match="no class list is called 'imagenet'") as error:
        class_list(replace(SPEC, classes="imagenet"), [], None)
    assert "imagenet-1k" in error.value.hint


# Texts


def test_templates_are_open_clips():
    assert templates_of(replace(SPEC, templates=("a {}.",))) == ("a {}.",)
    for name, theirs in {
        "openai_imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES,
        "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    }.items():
        ours = templates_of(replace(SPEC, templates=name))
        assert [text.format("tench") for text in ours] == [one("tench") for one in theirs]
    with pytest.raises(SpecError, match="no set of templates is called 'openai'"):
        templates_of(replace(SPEC, templates="openai"))


# Ids


def test_ids_are_the_path_or_what_the_pattern_finds():
    keys = ["cat/a.b.JPG", "cat/c.jpeg", "x.tar.gz"]
    assert make_ids(keys, SPEC, "train/", "") == ("train/cat/a.b", "train/cat/c", "train/x.tar.gz")
    spec = replace(SPEC, id_pattern=r"(n\d{8}_\d+|ILSVRC2012_val_\d{8})")
    keys = ["n01440764/n01440764_10026.JPEG", "n01440764_10026_n01440764.JPEG"]
    assert set(make_ids(keys, spec, "train/", "")) == {"n01440764_10026"}
    with pytest.raises(DataError, match=r"no id in 1 of 2 paths, the first is 'readme\.jpg'"):
        make_ids([keys[0], "readme.jpg"], spec, "", "here")
    for pattern, why in (("(", "id_pattern"), ("n.*", "no group")):
        with pytest.raises(SpecError, match=why):
            make_ids(keys, replace(SPEC, id_pattern=pattern), "", "")
    assert [without_suffix(key) for key in ("a.png", ".png", "a", "a.cls")] == [
        "a", ".png", "a", "a.cls",
    ]  # fmt: skip


def test_letters_with_accents_are_one_name_however_they_are_written():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert make_ids([f"{composed}/1.jpg"], SPEC, "", "") == make_ids(
        [f"{decomposed}/1.jpg"], SPEC, "", ""
    )
    found = Found([composed])
    assert found.number(decomposed) == 0
    assert Found([decomposed]).names == found.names
    assert np.array_equal(numbers(found, [composed, decomposed], ""), [0, 0])
