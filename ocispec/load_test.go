package ocispec

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

func TestLoadErrors(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"empty", " \n", `config.json: is empty, want a JSON object`},
		{"null", "null", `config.json: is null, want an object`},
		{"array", "[]", `config.json: is an array, want an object`},
		{"string", `"x"`, `config.json: is a string, want an object`},
		{"not JSON", "hello", `config.json: line 1, column 1: invalid character 'h' looking for beginning of value`},
		{"cut off", "{\n \"root\": {", `config.json: line 2: the file ends in the middle of the JSON document`},
		{"comma", "{\n\t\"ociVersion\": \"1.0.0\",\n\t\"root\": {\"path\": \"x\",}\n}", `config.json: line 3, column 23: invalid character '}' looking for beginning of object key string`},
		{"two documents", "{}\n{}", `config.json: line 2, column 1: invalid character '{' after top-level value`},
		{"version", `{"ociVersion": 1}`, `config.json: line 1: ociVersion: is a number, want a string`},
		{"root", "{\n\"root\": \"rootfs\"}", `config.json: line 2: root: is a string, want an object`},
		{"readonly", `{"root": {"readonly": "yes"}}`, `config.json: line 1: root.readonly: is a string, want true or false`},
		{"args", "{\"process\": {\n\"args\": \"sh\"}}", `config.json: line 2: process.args: is a string, want an array`},
		{"one arg", `{"process": {"args": ["sh", 5]}}`, `config.json: line 1: process.args[1]: is a number, want a string`},
		{"uid", `{"process": {"user": {"uid": -1}}}`, `config.json: line 1: process.user.uid: is the number -1, want a whole number of at least 0 (uint32)`},
		{"uid fraction", `{"process": {"user": {"uid": 1.5}}}`, `config.json: line 1: process.user.uid: is the number 1.5, want a whole number of at least 0 (uint32)`},
		{"mounts", "{\"mounts\": [\n {\"destination\": \"/a\"},\n {\"destination\": true}]}", `config.json: line 3: mounts[1].destination: is a boolean, want a string`},
		{"options", `{"mounts": [{"options": {"a": 1}}]}`, `config.json: line 1: mounts[0].options: is an object, want an array`},
		{"annotations", `{"annotations": {"a": "b", "c": 1}}`, `config.json: line 1: annotations.c: is a number, want a string`},
		{"odd key", `{"annotations": {"a\nb": 1}}`, `config.json: line 1: annotations."a\nb": is a number, want a string`},
		{"deep", `{"linux": {"seccomp": {"syscalls": [{}, {"args": [{"index": "0"}]}]}}}`, `config.json: line 1: linux.seccomp.syscalls[1].args[0].index: is a string, want a whole number of at least 0 (uint)`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec, err := Load(strings.NewReader(tc.text))
			if err == nil || err.Error() != tc.want || spec != nil {
				t.Errorf("got  %v\nwant %s", err, tc.want)
			}
		})
	}
}

func TestLoadBounds(t *testing.T) {
	if _, err := Load(io.MultiReader(strings.NewReader(`{"ociVersion": "`), endless{})); !errors.Is(err, ErrTooLarge) {
		t.Errorf("an endless file: %v", err)
	}
	if _, err := Load(iotest.ErrReader(os.ErrPermission)); !errors.Is(err, os.ErrPermission) || !strings.HasPrefix(err.Error(), "read config.json: ") {
		t.Errorf("a file that cannot be read: %v", err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

func TestLoadOthers(t *testing.T) {
	p, err := LoadProcess(strings.NewReader(`{"args": ["sh"], "cwd": "/", "user": {"uid": 5}}`))
	if err != nil || p.User.UID != 5 {
		t.Errorf("a process: %v %v", p, err)
	}
	if _, err := LoadProcess(strings.NewReader(`{"args": "sh"}`)); err == nil || err.Error() != "process: line 1: args: is a string, want an array" {
		t.Errorf("a bad process: %v", err)
	}
	r, err := LoadResources(strings.NewReader(`{"pids": {"limit": 5}}`))
	if err != nil || *r.Pids.Limit != 5 {
		t.Errorf("resources: %v %v", r, err)
	}
	for _, load := range []func(io.Reader) error{
		func(r io.Reader) error { _, err := LoadProcess(r); return err },
		func(r io.Reader) error { _, err := LoadResources(r); return err },
	} {
		if err := load(strings.NewReader("null")); err == nil || !strings.HasSuffix(err.Error(), ": is null, want an object") {
			t.Errorf("null: %v", err)
		}
	}
}

func FuzzLoadTranslate(f *testing.F) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) == 0 {
		f.Fatal(err, files)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"process": {"args": ["sh", 5]}}`))
	f.Add([]byte("{\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		spec, err := Load(bytes.NewReader(data))
		if err != nil {
			oneLine(t, err)
			return
		}
		if err := Validate(spec); err != nil {
			oneLine(t, err)
		}
		req, err := Translate(spec, testOptions(nil))
		if err != nil {
			oneLine(t, err)
			return
		}
		for _, m := range req.Mounts {
			if !filepath.IsAbs(m.Source) || filepath.IsAbs(m.SharePath) || strings.Contains(m.SharePath, "..") {
				t.Errorf("a mount of %q at %q", m.Source, m.SharePath)
			}
		}
		for name := range req.Container.Resources.Unified {
			if strings.Contains(name, "/") {
				t.Errorf("a limit is written to %q", name)
			}
		}
		if _, err := json.Marshal(State(req.Container.HookState, "created", 1)); err != nil {
			t.Error(err)
		}
	})
}

// oneLine is what a person at a terminal and a log in JSON ask of an error.
func oneLine(t *testing.T, err error) {
	t.Helper()
	if s := err.Error(); s == "" || strings.ContainsAny(s, "\n\r") || len(s) > 4096 {
		t.Errorf("not one readable line: %q", s)
	}
}
