"""The paper's claims, checked at laptop size: trainings, rules, verdicts, and the page made of them."""
