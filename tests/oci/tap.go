package main

import (
	"bufio"
	"bytes"
	"regexp"
	"strings"
)

// tally counts the test lines of one program's TAP output.
type tally struct {
	Pass int `json:"pass"`
	Fail int `json:"fail,omitempty"`
	Skip int `json:"skip,omitempty"`
	// Inner counts the passes of TAP output that a program quotes in a
	// diagnostic: what runtimetest said inside the container. One mismatch
	// there ends runtimetest early while the program itself counts one failure,
	// so the number of passes is what tells.
	Inner int `json:"inner,omitempty"`
}

var innerPass = regexp.MustCompile(`(^|\\n|")ok \d+`)

// parseTAP reads TAP version 13. Text that is not TAP is ignored: the
// runtimes' own messages are mixed in.
func parseTAP(out []byte) tally {
	var t tally
	sc := bufio.NewScanner(bytes.NewReader(out))
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		line := sc.Text()
		directive := strings.ToUpper(line)
		if i := strings.LastIndex(directive, " # "); i >= 0 {
			directive = directive[i+3:]
		} else {
			directive = ""
		}
		exempt := strings.HasPrefix(directive, "SKIP") || strings.HasPrefix(directive, "TODO")
		switch {
		case line == "ok" || strings.HasPrefix(line, "ok "):
			if exempt {
				t.Skip++
			} else {
				t.Pass++
			}
		case line == "not ok" || strings.HasPrefix(line, "not ok "):
			if exempt {
				t.Skip++
			} else {
				t.Fail++
			}
		case strings.HasPrefix(line, " "):
			t.Inner += len(innerPass.FindAllString(strings.TrimSpace(line), -1))
		}
	}
	return t
}
