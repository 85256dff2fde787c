"""What the names in a report mean, for a reader who does not know the code."""

from __future__ import annotations

from typing import NamedTuple


class Term(NamedTuple):
    label: str
    meaning: str


FAMILIES = {
    "turn_taking": Term("Smooth turn-taking", "answer when the user has finished, and only then"),
    "pause": Term("Pauses", "stay silent while the user thinks in mid-sentence, then answer the whole"),
    "self_correction": Term("Self-correction", "answer what was meant: “seven, no, nine”"),
    "interruption": Term("Interruption", "stop when the user breaks in, then answer the new request"),
    "user_backchannel": Term("User backchannel", "keep talking through the user’s “mm-hm”"),
    "model_backchannel": Term("Model backchannel", "say “mm-hm” in a long story without taking over"),
    "verbal_cue": Term("Verbal cue", "speak at the cue, over the user if need be"),
    "no_answer": Term("No answer wanted", "say nothing to silence, noise, and people who talk to others"),
    "visual_cue": Term("Visual cue", "watch, and speak when the named thing appears"),
    "visual_question": Term("Visual question", "say what is seen"),
    "typed_text": Term("Typed text", "read what the user types and answer in speech"),
}

MEASUREMENTS = {
    "take_over": Term("takes the turn", "take-over rate: more than three words, or a second of them"),
    "latency": Term("turn latency", "user’s end to the model’s first word, where it took the turn; never negative"),
    "starts_early": Term("starts before the user’s end", "of the turns in which it speaks"),
    "pause_take_over": Term("takes over in a pause", "take-over rate of what was said during the user’s turn"),
    "interruption_take_over": Term("speaks after interruption", "take-over rate of what is heard after its end"),
    "interruption_latency": Term("latency after interruption", "interruption’s end to the first word after it"),
    "yields": Term("stops when interrupted", "the speech that the interruption met ended within a second of its onset"),
    "takes_new_turn": Term("stops and takes the new turn", "it stopped, then took over with words of its own"),
    "stop_latency": Term("stop latency", "interruption’s onset to the end of audible speech"),
    "stop_latency_claimed": Term("stop latency, claimed", "the same by the claimed words"),
    "keeps_floor": Term("keeps the floor", "goes on talking past the user’s backchannel to the end of its reply"),
    "false_take_over": Term("takes over unasked", "a take-over by words that begin where silence was due"),
    "false_utterance": Term("any word unasked", "any word at all that begins where silence was due"),
    "content": Term("content right", "the expected words, in order, in the reply window"),
    "user_words_noted": Term("user’s words noted", "share of the user’s words that the model noted"),
    "verbal_cue": Term("verbal cue met", "the right words inside the window, else 0"),
    "verbal_cue_delay": Term("verbal cue delay", "the window’s start to the word, where the cue was met"),
    "verbal_cue_stray": Term("verbal cue’s words elsewhere", "said outside every window: too early or too late"),
    "visual_cue": Term("visual cue met", "the right words inside the window, else 0"),
    "visual_cue_delay": Term("visual cue delay", "the window’s start to the word, where the cue was met"),
    "visual_cue_stray": Term("visual cue’s words elsewhere", "said outside every window: too early or too late"),
    "backchannel_take_over": Term("takes over in a story", "Full-Duplex-Bench v1’s verdict on the voiced segments"),
    "backchannel_frequency": Term("backchannels a second", "voiced segments of at most 3 s"),
    "backchannel_distance": Term("backchannel timing", "Jensen-Shannon distance to the truth windows, 1 without any"),
    "backchannel_in_window": Term("backchannel in its window", "an acknowledgement begins in the window"),
    "backchannel_stray": Term("backchannels elsewhere", "utterances that begin in no window, a minute"),
    "overlap_stop_latency": Term("overlap until it stops", "v1.5: each stretch in which both speak"),
    "overlap_response_latency": Term("response, with overlap", "v1.5: user’s end to the model’s next start"),
    "clean_response_latency": Term("response, without it", "the same in the clean run"),
    "behaviour_proxy_respond": Term("proxy: responds", "says what the event asked for"),
    "behaviour_proxy_resume": Term("proxy: resumes", "says on what it says in the clean run"),
    "behaviour_proxy_silent": Term("proxy: silent", "says nothing after the event"),
    "behaviour_proxy_other": Term("proxy: other", "says something else"),
    "audible_agreement": Term("heard = claimed", "share of 200 ms cells where sound and claim agree"),
    "audible_agreement_in_speech": Term("heard = claimed, in speech", "of cells where either speaks: both do"),
    "tick": Term("tick", "one micro-turn of the decoder, for all sessions that share it"),
    "vocoder": Term("vocoder", "mel to sound for one micro-turn, of all sessions that were decoded together"),
}

LOSSES = {
    "loss/total": "all terms, weighted",
    "loss/text": "text: words, silence, holding",
    "loss/flow": "voice: flow matching of the mel",
    "loss/heard": "notes: the user’s words",
    "loss/seen": "notes: what the frames show; ln 2 at best, for two words in any order",
    "loss/router_z": "router z-loss",
}


def family(name: str) -> Term:
    return FAMILIES.get(name, Term(name.replace("_", " ").capitalize(), ""))


def loss(name: str) -> str:
    return LOSSES.get(name, name.removeprefix("loss/").replace("_", " "))


def measurement(name: str) -> Term:
    return MEASUREMENTS.get(name, Term(name.replace("_", " "), ""))
