//! Tests of the script parser: what a line becomes on the wire, and what a wrong line says.

use rand::SeedableRng;

use super::*;

fn parse(text: &str) -> Result<Script, ScriptError> {
    Script::parse("test.script", 1, text, &mut Variables::predefined(2, 7))
}

/// What the commands of a script look like on the wire when each variable has its starting value.
fn wire(text: &str) -> String {
    let mut variables = Variables::predefined(2, 7);
    let script = Script::parse("test.script", 1, text, &mut variables).unwrap();
    let mut random = Random::seed_from_u64(1);
    let payload = Payload::new(5, &mut random);
    let mut out = Vec::new();
    for step in &script.steps {
        if let Step::Command(template) = step {
            template.encode(&mut out, &variables.values, &payload, &mut random);
        }
    }
    String::from_utf8(out).unwrap()
}

#[test]
fn variables_are_substituted_and_other_colons_stay() {
    assert_eq!(wire("GET account::naccounts"), "*2\r\n$3\r\nGET\r\n$14\r\naccount:200000\r\n");
    assert_eq!(wire("SET user:1:name :scale"), "*3\r\n$3\r\nSET\r\n$11\r\nuser:1:name\r\n$1\r\n2\r\n");
    assert_eq!(wire("GET a:scales"), "*2\r\n$3\r\nGET\r\n$8\r\na:scales\r\n", "only whole names count");
    assert_eq!(wire("\\set x 1\nGET :x:scale:"), "*2\r\n$3\r\nGET\r\n$3\r\n02:\r\n");
}

#[test]
fn quotes_and_escapes_work_as_in_redis_cli() {
    assert_eq!(wire(r#"SET k "a b\r\n\x41\"""#), "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$7\r\na b\r\nA\"\r\n");
    assert_eq!(wire("SET k ''"), "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n");
    assert_eq!(wire(r"SET k 'a\n'"), "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3\r\na\\n\r\n");
}

#[test]
fn payloads_have_the_asked_size() {
    let text = wire("SET k :payload");
    assert!(text.starts_with("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\n"), "{text:?}");
    assert_eq!(text.len(), "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\n".len() + 5 + 2);
}

#[test]
fn numbers_print_at_their_bounds() {
    for number in [0, 9, 10, -1, i64::MAX, i64::MIN] {
        let mut out = Vec::new();
        write_number(&mut out, number);
        assert_eq!(String::from_utf8(out).unwrap(), number.to_string());
    }
}

#[test]
fn comments_and_sleeps_and_pipelines_parse() {
    let script =
        parse("-- a comment\n# another\n\n\\sleep :scale * 10 ms\n\\startpipeline\nPING\n\\endpipeline\n").unwrap();
    assert_eq!(script.steps.len(), 4);
    assert!(matches!(&script.steps[0], Step::Sleep(_, unit) if *unit == Duration::from_millis(1)));
    assert_eq!(script.steps[1], Step::StartPipeline);
}

#[test]
fn what_is_wrong_names_the_line() {
    for (text, says) in [
        ("PING\n\\set aid", "test.script, line 2: \\set needs a name"),
        ("\\set 1a 5\nPING", "line 1: \"1a\" is not a variable's name"),
        ("\\set payload 5\nPING", "choose another name"),
        ("\\if 1\nPING", "no command \\if; there are \\set"),
        ("\\set a :b\nPING", ":b was never set"),
        ("SET k \"x", "a quote is not closed"),
        ("SET k \"x\"y", "a blank must follow"),
        ("\\endpipeline\nPING", "no pipeline is open"),
        ("\\startpipeline\nPING", "has no \\endpipeline"),
        ("\\set a 1", "has no command"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(says), "{text:?}: {error}");
    }
}

#[test]
fn every_builtin_parses() {
    for (name, title, ..) in BUILTINS {
        let script = Script::builtin(name, 3, &mut Variables::predefined(1, 0)).unwrap();
        assert_eq!((script.name.as_str(), script.weight), (title, 3));
    }
    let error = Script::builtin("tpcc", 1, &mut Variables::default()).unwrap_err();
    assert!(error.contains("tpcb-like, simple-update, append, select-only"), "{error}");
}
