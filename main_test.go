package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/bundle"
	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/config"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/template"
)

// testApp is a command line whose configuration is the default one.
func testApp(t *testing.T) *app {
	t.Helper()
	a := &app{config: config.Default(), log: newLogger()}
	a.log.stderr = &bytes.Buffer{}
	return a
}

// command runs one command line and returns what it printed and its error.
func command(t *testing.T, args ...string) (string, error) {
	t.Helper()
	a := testApp(t)
	root := a.command()
	var out bytes.Buffer
	root.Writer, root.ErrWriter = &out, &out
	conf := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(conf, []byte("vcpus = 2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := root.Run(t.Context(), append([]string{"runv", "--config", conf}, args...))
	a.log.close()
	return out.String(), err
}

func codeOf(err error) int {
	var exit *exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.code
	}
	return 1
}

func TestUsage(t *testing.T) {
	root := t.TempDir()
	for _, tc := range []struct {
		args []string
		code int
		want string // of the error
	}{
		{[]string{"state", "x"}, 1, "container does not exist"},
		{[]string{"start", "x"}, 1, "container does not exist"},
		{[]string{"kill", "x"}, 1, "container does not exist"},
		{[]string{"delete", "x"}, 1, "container does not exist"},
		{[]string{"delete", "--force", "x"}, 0, ""},
		{[]string{"delete", "x", "-f"}, 0, ""},
		{[]string{"pause", "x"}, 1, "container does not exist"},
		{[]string{"resume", "x"}, 1, "container does not exist"},
		{[]string{"ps", "x", "-ef"}, 1, "container does not exist"},
		{[]string{"exec", "x", "sh", "-c", "true"}, 255, "exec failed: container does not exist"},
		{[]string{"exec", "-t", "-d", "x", "sh"}, 255, "exec failed: container does not exist"},
		{[]string{"exec", "--cgroup", "cpu:sub", "x", "sh"}, 255, "exec failed: --cgroup sub: a process in a virtual machine"},
		{[]string{"exec", "--cgroup", "/", "x", "sh"}, 255, "exec failed: container does not exist"},
		{[]string{"exec", "--preserve-fds", "1", "x", "sh"}, 255, "exec failed: --preserve-fds=1: "},
		{[]string{"exec"}, 1, `runv: "exec" requires a minimum of 1 argument(s)`},
		{[]string{"create"}, 1, `runv: "create" requires exactly 1 argument(s)`},
		{[]string{"create", "a", "b"}, 1, `runv: "create" requires exactly 1 argument(s)`},
		{[]string{"kill", "a", "b", "c"}, 1, `runv: "kill" requires a maximum of 2 argument(s)`},
		{[]string{"kill", "x", "SIGFOO"}, 1, `unknown signal "SIGFOO"`},
		{[]string{"create", "--bundle", "/nonexistent", "x"}, 1, "runv create failed: bundle: stat /nonexistent"},
		{[]string{"create", "-b", root, "x"}, 1, "runv create failed: JSON specification file config.json not found"},
		{[]string{"create", "-b", root, "a/b"}, 1, `runv create failed: invalid container ID format: "a/b"`},
		{[]string{"create", "-b", root, ""}, 1, `runv create failed: invalid container ID format`},
		{[]string{"run", "--preserve-fds", "3", "x"}, 1, "runv run failed: --preserve-fds=3: "},
		{[]string{"run", "-b", root, "--no-pivot", "--no-new-keyring", "--no-subreaper", "--keep", "-d", "--pid-file", "p", "--preserve-fds=0", "x"}, 1, "runv run failed: JSON specification file"},
		{[]string{"list", "--format", "xml"}, 1, "invalid format option"},
		{[]string{"list", "extra"}, 1, `runv: "list" requires exactly 0 argument(s)`},
		{[]string{"state", "--bar", "x"}, 1, "runv state: flag provided but not defined: -bar"},
		{[]string{"--bar", "state", "x"}, 1, "runv: flag provided but not defined: -bar"},
		{[]string{"frobnicate"}, 3, `no command is named "frobnicate"`},
		{[]string{"manage", "frobnicate"}, 1, `no command is named "manage frobnicate"`},
		{[]string{"--memory", "12", "list"}, 1, `key "memory" is 12 MiB`},
		{[]string{"--memory", "1G", "list"}, 1, `--memory: "1G" is not a number`},
		{[]string{"list", "--network", "bridge"}, 1, `key "network" is "bridge"`},
		{[]string{"--rootless", "perhaps", "list"}, 1, `--rootless is "perhaps"`},
		{[]string{"--log-format", "xml", "list"}, 1, `key "log-format" is "xml"`},
		{[]string{"--log", "/nonexistent/log", "list"}, 1, "open log file: "},
		{[]string{"--config", "/nonexistent", "list"}, 1, "read configuration: "},
		{[]string{"--systemd-cgroup", "--rootless", "true", "--criu", "criu", "--debug", "list"}, 0, ""},
		{[]string{"list"}, 0, ""},
	} {
		t.Run(strings.Join(tc.args, " "), func(t *testing.T) {
			_, err := command(t, append([]string{"--root", root}, tc.args...)...)
			if code := codeOf(err); code != tc.code {
				t.Errorf("exit code %d, want %d (%v)", code, tc.code, err)
			}
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.HasPrefix(err.Error(), tc.want)) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
}

func TestFlagsWinOverTheFile(t *testing.T) {
	a := testApp(t)
	root := a.command()
	root.Writer = &bytes.Buffer{}
	conf := filepath.Join(t.TempDir(), "c.toml")
	text := "vcpus = 2\nmemory = 256\nnetwork = \"user\"\nqemu-sandbox = false\nroot = \"relative\"\n"
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"runv", "--config", conf, "--memory", "1024", "--root", t.TempDir(), "list", "--network=none", "--boot-timeout", "5s"}
	if err := root.Run(t.Context(), args); err != nil {
		t.Fatal(err)
	}
	want := config.Default()
	want.VCPUs, want.Memory, want.QEMUSandbox, want.BootTimeout = 2, 1024, false, config.Duration(5*time.Second)
	want.Network = "none"
	want.Root = a.config.Root
	if a.config != want || !filepath.IsAbs(a.config.Root) {
		t.Errorf("got %+v, want %+v", a.config, want)
	}
}

func TestStateAndList(t *testing.T) {
	root := t.TempDir()
	s := state.Open(root)
	created := time.Date(2026, 11, 23, 17, 30, 33, 53484283, time.UTC)
	for id, r := range map[string]*state.Record{
		"run": {Status: state.Running, StandIn: state.Self(), Supervisor: state.Self(), Annotations: map[string]string{"k": "v"}},
		"old": {Status: state.Stopped, StandIn: state.ProcessRef{Pid: 1 << 22}, ExitCode: 137, OOMKilled: true, Reason: "why"},
	} {
		if err := s.Reserve(id); err != nil {
			t.Fatal(err)
		}
		r.ID, r.SandboxID, r.Bundle, r.Rootfs, r.OCIVersion, r.Created = id, id, "/b", "/b/rootfs", "1.3.0", created
		if err := s.Save(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Reserve("half"); err != nil {
		t.Fatal(err)
	}
	out, err := command(t, "--root", root, "state", "run")
	if err != nil {
		t.Fatal(err)
	}
	var oci specs.State
	if err := json.Unmarshal([]byte(out), &oci); err != nil {
		t.Fatal(err)
	}
	if oci.ID != "run" || oci.Status != specs.StateRunning || oci.Pid != os.Getpid() || oci.Bundle != "/b" || oci.Version != "1.3.0" || oci.Annotations["k"] != "v" {
		t.Errorf("%s", out)
	}
	out, err = command(t, "--root", root, "list", "-q")
	if err != nil || out != "half\nold\nrun\n" {
		t.Errorf("%q, %v", out, err)
	}
	out, err = command(t, "--root", root, "list", "--format", "json")
	if err != nil {
		t.Fatal(err)
	}
	var list []containerState
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 3 {
		t.Fatalf("%v: %s", err, out)
	}
	if l := list[1]; l.ID != "old" || l.Pid != 0 || l.Status != "stopped" || !l.Created.Equal(created) || l.Rootfs != "/b/rootfs" || l.Owner != "root" || !l.OOMKilled || l.Reason != "why" {
		t.Errorf("%+v", l)
	}
	out, err = command(t, "--root", root, "list")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(out, "\n")
	if f := strings.Fields(lines[0]); strings.Join(f, " ") != "ID PID STATUS BUNDLE CREATED OWNER" {
		t.Errorf("header %q", lines[0])
	}
	if f := strings.Fields(lines[2]); strings.Join(f, " ") != "old 0 stopped /b 2026-11-23T17:30:33.053484283Z root" {
		t.Errorf("row %q", lines[2])
	}
	// Of what has stopped, there is nothing to list or kill.
	if out, err = command(t, "--root", root, "ps", "-f", "json", "old"); err != nil || out != "[]\n" {
		t.Errorf("%q, %v", out, err)
	}
	if _, err = command(t, "--root", root, "kill", "--all", "old"); err != nil {
		t.Error(err)
	}
	if _, err = command(t, "--root", root, "kill", "old"); err == nil || err.Error() != "container not running" {
		t.Error(err)
	}
	// A record that cannot be read does not hide the others.
	if err := os.WriteFile(filepath.Join(root, "old", state.RecordFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err = command(t, "--root", root, "list", "-q"); err == nil || out != "half\nrun\n" {
		t.Errorf("%q, %v", out, err)
	}
}

// With a root directory that outlives the machine's boot, a record may name a process
// of today by the pid and start time of one that is gone.
func TestAfterBoot(t *testing.T) {
	other := exec.Command("sleep", "1000")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = other.Process.Kill()
		_ = other.Wait()
	}()
	ref, err := state.RefOf(other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	s := state.Open(root)
	if err := s.Reserve("c"); err != nil {
		t.Fatal(err)
	}
	hooked := filepath.Join(t.TempDir(), "hooked")
	if err := s.Save(&state.Record{
		ID: "c", SandboxID: "c", Bundle: t.TempDir(), OCIVersion: "1.3.0", Status: state.Running, StandIn: ref, Supervisor: ref, VM: ref,
		PoststopHooks: []specs.Hook{{Path: "/bin/touch", Args: []string{"touch", hooked}}},
	}); err != nil {
		t.Fatal(err)
	}
	runv := func(args ...string) string {
		t.Helper()
		out, err := command(t, append([]string{"--root", root}, args...)...)
		if err != nil {
			t.Errorf("%q: %v", args, err)
		}
		return out
	}
	status := func() (one, all string) {
		t.Helper()
		var st specs.State
		var list []containerState
		if err := errors.Join(json.Unmarshal([]byte(runv("state", "c")), &st), json.Unmarshal([]byte(runv("list", "--format", "json")), &list)); err != nil || len(list) != 1 {
			t.Fatalf("%v, %v", list, err)
		}
		return fmt.Sprint(st.Status, " ", st.Pid), fmt.Sprint(list[0].Status, " ", list[0].Pid)
	}
	const line = "would remove container c: it is recorded as running, and its supervisor is gone\n"
	running := fmt.Sprint("running ", ref.Pid)
	if one, all := status(); one != running || all != running || strings.Contains(runv("manage", "gc"), line) {
		t.Fatalf("before the boot: %s, %s", one, all)
	}
	record := filepath.Join(s.Dir("c"), state.RecordFile)
	text, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(record, bytes.Replace(text, []byte(state.BootID()), []byte("another"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if one, all := status(); one != "stopped 0" || all != "stopped 0" {
		t.Errorf("after it: %s, %s", one, all)
	}
	if out := runv("manage", "gc"); !strings.Contains(out, line) {
		t.Errorf("gc says %q", out)
	}
	if _, err := command(t, "--root", root, "kill", "c", "KILL"); err == nil || err.Error() != "container not running" {
		t.Errorf("kill: %v", err)
	}
	runv("delete", "c")
	if out := runv("list", "-q"); out != "" {
		t.Errorf("left: %q", out)
	}
	if _, err := os.Stat(hooked); err != nil {
		t.Errorf("the poststop hook: %v", err)
	}
	if !ref.Alive() {
		t.Error("another's process was killed")
	}
}

func TestParseSignal(t *testing.T) {
	for text, want := range map[string]unix.Signal{
		"TERM": 15, "SIGTERM": 15, "sigterm": 15, "term": 15, "15": 15, "9": 9, "KILL": 9, "0": 0, "64": 64,
		"HUP": 1, "CHLD": 17, "WINCH": 28, "SIGRTMIN": 34, "RTMIN+3": 37, "SIGRTMAX": 64, "rtmax-2": 62, "USR1": 10, "ABRT": 6, "STOP": 19, "PWR": 30,
	} {
		if got, err := parseSignal(text); err != nil || got != want {
			t.Errorf("%s: %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "FOO", "SIG", "-9", "65", "1000", "RTMIN+31", "RTMAX+1", "RTMIN3", "RTMIN+x", "TERMX", "0x9"} {
		if got, err := parseSignal(text); err == nil {
			t.Errorf("%q is signal %d", text, got)
		}
	}
}

func TestLog(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("x", 3600))
	for _, tc := range []struct {
		json bool
		msg  string
		want string
	}{
		{true, "a \"b\"", `{"level":"error","msg":"a \"b\"","time":"2026-01-02T02:04:05Z"}` + "\n"},
		{false, "a \"b\"", `time="2026-01-02T02:04:05Z" level=error msg="a \"b\""` + "\n"},
		{false, "plain", `time="2026-01-02T02:04:05Z" level=error msg=plain` + "\n"},
	} {
		if got := string(format(tc.json, "error", tc.msg, at)); got != tc.want {
			t.Errorf("%q, want %q", got, tc.want)
		}
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	var stderr bytes.Buffer
	l := &logger{stderr: &stderr}
	if err := l.open(path, "json", false); err != nil {
		t.Fatal(err)
	}
	l.fatal("it failed")
	l.warning("take care")
	l.debugf("not written")
	l.close()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(b, []byte("\n")); n != 2 || stderr.String() != "it failed\n" {
		t.Errorf("the file has %q, standard error %q", b, stderr.String())
	}
	for _, line := range bytes.Split(bytes.TrimSpace(b), []byte("\n")) {
		var m map[string]string
		if err := json.Unmarshal(line, &m); err != nil || m["level"] == "" || m["msg"] == "" || m["time"] == "" {
			t.Errorf("%s: %v", line, err)
		}
	}
	// Without a file, the format is that of standard error.
	stderr.Reset()
	l = &logger{stderr: &stderr, json: true}
	l.fatal("x")
	if !strings.HasPrefix(stderr.String(), `{"level":"error","msg":"x"`) {
		t.Errorf("%q", stderr.String())
	}
}

func TestOneLine(t *testing.T) {
	err := errors.Join(errors.New("a"), errors.New("b\r\nc"))
	if got := oneLine(err.Error()); got != "a; b; c" {
		t.Errorf("%q", got)
	}
}

func TestCheckConsole(t *testing.T) {
	for _, tc := range []struct {
		terminal, detach bool
		socket           string
		ok               bool
	}{
		{false, false, "", true},
		{false, true, "", true},
		{true, false, "", true},
		{true, true, "s", true},
		{true, true, "", false},
		{true, false, "s", false},
		{false, true, "s", false},
		{false, false, "s", false},
	} {
		if err := checkConsole(tc.terminal, tc.detach, tc.socket); (err == nil) != tc.ok {
			t.Errorf("%+v: %v", tc, err)
		}
	}
}

func TestExecProcess(t *testing.T) {
	dir := t.TempDir()
	conf := `{"ociVersion":"1.3.0","root":{"path":"rootfs"},"process":{"terminal":true,"args":["init"],"cwd":"/","env":["A=1"],
		"user":{"uid":5,"gid":6,"additionalGids":[7]},"capabilities":{"bounding":["CAP_KILL"]}}}`
	if err := os.WriteFile(filepath.Join(dir, bundle.SpecFile), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	ct := &client.Container{Record: &state.Record{ID: "c", Bundle: dir}}
	run := func(args ...string) (p *specs.Process, err error) {
		a := testApp(t)
		cmd := a.command().Command("exec")
		cmd.Action = func(_ context.Context, c *cli.Command) error {
			p, err = execProcess(c, ct)
			return nil
		}
		if rerr := cmd.Run(t.Context(), append([]string{"exec"}, args...)); rerr != nil {
			t.Fatal(rerr)
		}
		return p, err
	}
	p, err := run("c", "ls", "-t", "--user", "x")
	if err != nil || strings.Join(p.Args, " ") != "ls -t --user x" || p.Terminal || p.User.UID != 5 || p.Cwd != "/" {
		t.Errorf("%+v, %v", p, err)
	}
	p, err = run("-t", "-e", "B=2,3", "--env", "C= 4 ", "--cwd", "/tmp", "-u", "10:20", "-g", "30", "-g", "40", "-c", "CAP_NET_RAW", "--no-new-privs", "--apparmor", "a", "--process-label", "l", "c", "sh")
	if err != nil {
		t.Fatal(err)
	}
	if !p.Terminal || strings.Join(p.Env, "|") != "A=1|B=2,3|C= 4 " || p.Cwd != "/tmp" || p.User.UID != 10 || p.User.GID != 20 ||
		len(p.User.AdditionalGids) != 3 || p.User.AdditionalGids[2] != 40 || !p.NoNewPrivileges || p.ApparmorProfile != "a" || p.SelinuxLabel != "l" {
		t.Errorf("%+v", p)
	}
	if c := p.Capabilities; strings.Join(c.Bounding, " ") != "CAP_KILL CAP_NET_RAW" || len(c.Ambient) != 1 || len(c.Effective) != 1 || len(c.Permitted) != 1 || len(c.Inheritable) != 0 {
		t.Errorf("%+v", c)
	}
	for _, args := range [][]string{{"c"}, {"-u", "root", "c", "sh"}, {"-u", "1:g", "c", "sh"}, {"-g", "x", "c", "sh"}, {"-p", "/nonexistent", "c"}} {
		if _, err := run(args...); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
	file := filepath.Join(dir, "process.json")
	if err := os.WriteFile(file, []byte(`{"args":["a","b"],"cwd":"/x","user":{"uid":1,"gid":2}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err = run("--process", file, "c"); err != nil || strings.Join(p.Args, " ") != "a b" || p.Cwd != "/x" {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestPrintProcesses(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	list := []*agentv1.ProcessInfo{
		{Pid: 80, Ppid: 1, Tty: "?", StartUnix: now.Unix() - 100, CpuMilliseconds: 3_725_000, Command: "sleep 100\x1b[2J"},
		{Pid: 81, Ppid: 80, Uid: 1000, Tty: "pts/0", StartUnix: now.Unix() - 200_000, Command: "sh"},
	}
	var b bytes.Buffer
	if err := printProcesses(&b, list, now); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(b.String(), "\n")
	if f := strings.Fields(lines[0]); len(f) != 8 || f[1] != "PID" {
		t.Errorf("%q", lines[0])
	}
	if f := strings.Fields(lines[1]); f[0] != "root" || f[1] != "80" || f[2] != "1" || f[3] != "99" || f[6] != "01:02:05" || f[8] != "100?[2J" {
		t.Errorf("%q", lines[1])
	}
	if f := strings.Fields(lines[2]); f[0] != "1000" || f[5] != "pts/0" || f[4] != time.Unix(now.Unix()-200_000, 0).Format("Jan02") {
		t.Errorf("%q", lines[2])
	}
}

func TestCheckpointIsRefused(t *testing.T) {
	for _, args := range [][]string{{"checkpoint", "--image-path", "/x", "--leave-running", "c"}, {"restore", "--bundle", "/b", "c"}} {
		err := testApp(t).command().Run(t.Context(), append([]string{"runv"}, args...))
		if err == nil || !strings.Contains(err.Error(), args[0]+" is not supported") {
			t.Errorf("%v: %v", args, err)
		}
	}
}

func TestSpec(t *testing.T) {
	dir := t.TempDir()
	if _, err := command(t, "spec", "-b", dir); err != nil {
		t.Fatal(err)
	}
	spec, err := bundle.Load(dir)
	if err != nil || spec.Process.Args[0] != "sh" || !spec.Process.Terminal {
		t.Errorf("%+v, %v", spec, err)
	}
	if _, err := command(t, "spec", "-b", dir); err == nil || err.Error() != "file config.json exists. Remove it first" {
		t.Error(err)
	}
	dir = t.TempDir()
	if _, err := command(t, "spec", "--rootless", "--bundle", dir); err != nil {
		t.Fatal(err)
	}
	if spec, err = bundle.Load(dir); err != nil || len(spec.Linux.UIDMappings) == 0 {
		t.Errorf("%+v, %v", spec, err)
	}
}

func TestFeatures(t *testing.T) {
	out, err := command(t, "features")
	if err != nil {
		t.Fatal(err)
	}
	var f struct {
		OCIVersionMin string `json:"ociVersionMin"`
		Linux         struct {
			Namespaces []string `json:"namespaces"`
		} `json:"linux"`
	}
	if err := json.Unmarshal([]byte(out), &f); err != nil || f.OCIVersionMin == "" || len(f.Linux.Namespaces) == 0 {
		t.Errorf("%v: %s", err, out)
	}
}

func TestGuestImageIsMissing(t *testing.T) {
	a := testApp(t)
	a.config.Kernel = filepath.Join(t.TempDir(), "kernel")
	if _, err := a.vm(); err == nil || !strings.Contains(err.Error(), "runv manage build-guest") {
		t.Error(err)
	}
	a.config.Kernel = t.TempDir()
	if _, err := a.vm(); err == nil || !strings.Contains(err.Error(), "is not a regular file") {
		t.Error(err)
	}
}

func TestTemplateOfAVM(t *testing.T) {
	dir := t.TempDir()
	a := testApp(t)
	a.config.Kernel, a.config.Initrd = filepath.Join(dir, "kernel"), filepath.Join(dir, "initrd")
	for _, f := range []string{a.config.Kernel, a.config.Initrd} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	for _, tc := range []struct{ template, policy, want, wantPolicy string }{
		{"", "preferred", "", ""},
		{"off", "preferred", "", ""},
		{"/run/t", "off", "", ""},
		{"/run/t", "required", "/run/t", "required"},
		{"t", "preferred", filepath.Join(dir, "t"), "preferred"},
	} {
		a.config.Template, a.config.TemplatePolicy = tc.template, tc.policy
		vm, err := a.vm()
		if err != nil || vm.Template != tc.want || vm.TemplatePolicy != tc.wantPolicy {
			t.Errorf("%+v: template %q, policy %q, %v", tc, vm.GetTemplate(), vm.GetTemplatePolicy(), err)
		}
	}
	const boots, clones = `{"cpu":1,"memory":64}`, `{"template":true,"cpu":1,"memory":64}`
	for _, tc := range []struct{ factory, template, policy, want, wantFactory, wantPolicy string }{
		{"none", "", "preferred", "", "", ""},
		{boots, "/run/t", "required", "", boots, "required"},
		{clones, "/run/t", "preferred", "/run/t", clones, "preferred"},
		{clones, "", "preferred", config.DefaultTemplates(), clones, "preferred"},
		{clones, "off", "preferred", "", "", ""},
		{clones, "", "off", "", "", ""},
	} {
		a.config.Factory, a.config.Template, a.config.TemplatePolicy = tc.factory, tc.template, tc.policy
		vm, err := a.vm()
		if err != nil || vm.Template != tc.want || vm.Factory != tc.wantFactory || vm.TemplatePolicy != tc.wantPolicy {
			t.Errorf("%+v: %v, %v", tc, vm, err)
		}
	}
}

func TestPrintTemplates(t *testing.T) {
	m := template.Manifest{VCPUs: 2, MemoryMiB: 512, StoredBytes: 83 << 20, Driver: "qemu", DriverVersion: "7.2"}
	m.KernelRelease, m.AgentVersion = "6.1", "0.1"
	list := []templateInfo{
		{Template: "/a", Manifest: m, Held: true, Clones: 3},
		{Template: "/b", Manifest: m},
		{Template: "/c", Error: "it is damaged"},
	}
	var out bytes.Buffer
	if err := printTemplates(&out, list, "table"); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(out.String(), "\n")
	for i, want := range [][]string{
		{"TEMPLATE", "CLONES"},
		{"/a", "512 MiB", "83 MiB", "6.1", "0.1", "qemu 7.2", "3"},
		{"/b", "not held"},
		{"/c", "it is damaged"},
	} {
		for _, w := range want {
			if !strings.Contains(lines[i], w) {
				t.Errorf("line %d is %q, without %q", i, lines[i], w)
			}
		}
	}
	out.Reset()
	if err := printTemplates(&out, list[:1], "json"); err != nil {
		t.Fatal(err)
	}
	for _, w := range []string{`"template":"/a"`, `"memory_mib":512`, `"kernel_release":"6.1"`, `"clones":3`, `"held":true`} {
		if !strings.Contains(out.String(), w) {
			t.Errorf("the JSON lacks %s: %s", w, &out)
		}
	}
	list, err := listTemplates(t.Context(), []string{filepath.Join(t.TempDir(), "none")})
	if err != nil || list == nil || len(list) != 0 {
		t.Errorf("no templates are %v, %v", list, err)
	}
}
