package config

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestExampleIsCompleteAndTrue(t *testing.T) {
	text := string(Example())
	// Every commented setting, uncommented, must give exactly the defaults.
	live := regexp.MustCompile(`(?m)^#([a-z-]+ = )`).ReplaceAllString(text, "$1")
	var c Config
	if err := c.Decode("example", []byte(live)); err != nil {
		t.Fatal(err)
	}
	if want := Default(); c != want {
		t.Errorf("the example's values are\n%+v, want the defaults\n%+v", c, want)
	}
	for _, k := range Keys() {
		if !regexp.MustCompile(`(?m)^#` + regexp.QuoteMeta(k.Name) + ` = `).MatchString(text) {
			t.Errorf("the example lacks key %q", k.Name)
		}
	}
	// As it is installed, it changes nothing.
	d := Default()
	if err := d.Decode("example", []byte(text)); err != nil || d != Default() {
		t.Errorf("the commented example gives %+v, %v", d, err)
	}
}

func TestEveryFieldIsDescribed(t *testing.T) {
	typ := reflect.TypeOf(Config{})
	seen := map[string]bool{}
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, usage := f.Tag.Get("toml"), f.Tag.Get("usage")
		if name == "" || usage == "" || seen[name] {
			t.Errorf("field %s: key %q, usage %q", f.Name, name, usage)
		}
		seen[name] = true
		c := Default()
		v, err := c.Get(name)
		if err != nil {
			t.Errorf("get %s: %v", name, err)
		}
		if err := c.Set(name, v); err != nil || c != Default() {
			t.Errorf("set %s to its default %q: %+v, %v", name, v, c, err)
		}
	}
	c := Default()
	if err := c.Validate(); err != nil {
		t.Errorf("the defaults are refused: %v", err)
	}
}

func TestTemplateIsRequired(t *testing.T) {
	c := Default()
	c.TemplatePolicy = "required"
	for _, dir := range []string{"", "off"} {
		if c.Template = dir; c.Validate() == nil {
			t.Errorf("template %q is accepted", dir)
		}
	}
	c.Template = "/run/t"
	if err := c.Validate(); err != nil || c.TemplateDir() != "/run/t" {
		t.Errorf("%v, directory %q", err, c.TemplateDir())
	}
	c.Template = ""
	c.Factory = `{"template":true,"cpu":2,"memory":64}`
	if err := c.Validate(); err != nil || c.TemplateDir() != "" || c.TemplatesDir() != DefaultTemplates() || len(c.Entries()) != 1 {
		t.Errorf("with a factory: %v, directory %q, of templates %q, %d entries", err, c.TemplateDir(), c.TemplatesDir(), len(c.Entries()))
	}
	c.Template = "/run/t"
	if dir := c.TemplatesDir(); dir != "/run/t" {
		t.Errorf("the templates of a factory are in %q", dir)
	}
	c.TemplatePolicy = "off"
	if n := len(c.Entries()); n != 0 {
		t.Errorf("with template-policy off there are %d entries", n)
	}
	if dir := c.TemplateDir(); dir != "" {
		t.Errorf("policy off clones from %q", dir)
	}
}

func TestDecode(t *testing.T) {
	for _, tc := range []struct {
		name, text, err string
		want            func(*Config)
	}{
		{name: "empty", text: ""},
		{name: "several", text: "memory = 2048\nvcpus=4\nnetwork = 'user'\nboot-timeout = \"5s\"\nqemu-sandbox = false\n", want: func(c *Config) {
			c.Memory, c.VCPUs, c.Network, c.BootTimeout, c.QEMUSandbox = 2048, 4, "user", Duration(5*time.Second), false
		}},
		{name: "unknown key", text: "# a comment\n\nmemory = 256\nkernle = \"/x\"\n", err: `f:4: unknown key "kernle"`},
		{name: "unknown table", text: "memory = 256\n\n[hypervisor]\npath = 1\n", err: `f:3: unknown key "hypervisor"`},
		{name: "wrong type", text: "\nmemory = \"much\"\n", err: `f:2: `},
		{name: "not TOML", text: "memory 256\n", err: `f:1: `},
		{name: "twice", text: "memory = 128\nmemory = 256\n", err: `f:2: `},
		{name: "bad duration", text: "boot-timeout = \"soon\"\n", err: `f:1: `},
		{name: "bad network", text: "\n\nnetwork = \"bridge\"\n", err: `f:3: key "network" is "bridge", want "namespace" or "none" or "user"`},
		{name: "little memory", text: "memory = 1\n", err: `f:1: key "memory" is 1 MiB, want 64 to`},
		{name: "no cpu", text: "vcpus = 0\n", err: `f:1: key "vcpus" is 0`},
		{name: "no kernel", text: "kernel = \"\"\n", err: `f:1: key "kernel" is empty`},
		{name: "no time", text: "boot-timeout = \"0s\"\n", err: `f:1: key "boot-timeout" is 0s`},
		{name: "params", text: "kernel-params = \"a\\nb\"\n", err: `f:1: key "kernel-params"`},
		{name: "template", text: "template = \"/run/t\"\n", want: func(c *Config) { c.Template = "/run/t" }},
		{name: "template required", text: "template = \"/run/t\"\ntemplate-policy = \"required\"\n", want: func(c *Config) { c.Template, c.TemplatePolicy = "/run/t", "required" }},
		{name: "factory", text: "factory = '{\"template\":true,\"cpu\":1,\"memory\":512}'\n", want: func(c *Config) {
			c.Factory = `{"template":true,"cpu":1,"memory":512}`
		}},
		{
			name: "bad factory", text: "vcpus = 2\nfactory = '{\"cpu\":1,\"memory\":1}'\n",
			err: `f:2: key "factory": factory policy: memory is 1, want 64 to 16777216 (character 19, near "1}")`,
		},
		{name: "bad policy", text: "\ntemplate-policy = \"maybe\"\n", err: `f:2: key "template-policy" is "maybe", want "required" or "preferred" or "off"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := Default()
			err := c.Decode("f", []byte(tc.text))
			if tc.err != "" {
				if err == nil || !strings.HasPrefix(err.Error(), tc.err) {
					t.Fatalf("error is %v, want one that begins with %q", err, tc.err)
				}
				if strings.ContainsRune(err.Error(), '\n') {
					t.Errorf("the error has more than one line: %q", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := Default()
			if tc.want != nil {
				tc.want(&want)
			}
			if c != want {
				t.Errorf("got %+v, want %+v", c, want)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "absent.toml")); err == nil || !strings.Contains(err.Error(), "absent.toml") {
		t.Errorf("a path that was given and is absent: %v", err)
	}
	if _, err := Load(dir); err == nil {
		t.Error("a directory is taken for a file")
	}
	path := filepath.Join(dir, "c.toml")
	if err := os.WriteFile(path, []byte("vcpus = 3\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err != nil || c.VCPUs != 3 {
		t.Errorf("got %+v, %v", c, err)
	}
}

func TestSet(t *testing.T) {
	for _, tc := range []struct{ name, value, err string }{
		{"memory", "1024", ""},
		{"memory", "1G", `--memory: "1G" is not a number`},
		{"qemu-sandbox", "maybe", `--qemu-sandbox: "maybe" is neither true nor false`},
		{"boot-timeout", "x", `--boot-timeout: "x" is not a duration`},
		{"nope", "x", `no setting is named "nope"`},
	} {
		c := Default()
		err := c.Set(tc.name, tc.value)
		if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.HasPrefix(err.Error(), tc.err)) {
			t.Errorf("set %s=%s: %v, want %q", tc.name, tc.value, err, tc.err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(Example())
	f.Add([]byte("memory = 1\n[a]\nb=2"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := Default()
		if err := c.Decode("f", data); err == nil {
			if err := c.Validate(); err != nil {
				t.Errorf("accepted and invalid: %v", err)
			}
		}
	})
}
