from evomoe.suggestions import nearest_key


def test_the_nearest_key_is_sought_among_siblings_first():
    known = ["trainer.seed", "trainer.speed", "data", "data.seed"]
    assert nearest_key("trainer.sed", known) == "; did you mean 'trainer.seed'?"
    assert nearest_key("data.sed", known) == "; did you mean 'data.seed'?"
    assert nearest_key("speed", known) == "; did you mean 'trainer.speed'?"
    assert nearest_key("data.zzz", known) == "; expected one of seed"
    assert nearest_key("zzz.zzz", known) == ""
