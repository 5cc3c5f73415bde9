package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const deployed = "../../deploy"

func TestDeployed(t *testing.T) {
	out := t.TempDir()
	for _, class := range []string{"", "runv", "runv-cli"} {
		want := class
		if class == "" {
			want = "runv"
		}
		if got, err := run(deployed, class, "/parent", "/logs", out); err != nil || got != want {
			t.Errorf("class %q: handler %q, %v", class, got, err)
		}
	}
	b, err := os.ReadFile(filepath.Join(out, "pod.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"cgroup_parent": "/parent"`, `"memory_limit_in_bytes": 268435456`, `"memory_limit_in_bytes": 335544320`, `"container_port": 8080`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("pod.json has no %s: %s", want, b)
		}
	}
}

// What Kubernetes would refuse is refused, and what names something that is not
// there.
func TestRefused(t *testing.T) {
	for _, c := range []struct{ file, old, new, want string }{
		{"pod.yaml", "kind: Pod", "kind: Pot", "is Pot of v1"},
		{"pod.yaml", "apiVersion: v1", "apiVersion: v2", "is Pod of v2"},
		{"pod.yaml", "runtimeClassName", "runtimeClass", "unknown field"},
		{"pod.yaml", "runtimeClassName: runv", "runtimeClassName: other", `no RuntimeClass "other"`},
		{"pod.yaml", "name: reader", "name: web", "its name is taken"},
		{"pod.yaml", "name: reader", "name: Reader", "lowercase"},
		{"pod.yaml", "128Mi", "128Mib", "quantities"},
		{"pod.yaml", "8080\n", "80800\n", "between 1 and 65535"},
		{"runtimeclass.yaml", "node.k8s.io/v1", "node.k8s.io/v1beta1", "v1beta1"},
		{"runtimeclass.yaml", "handler: runv-cli", "handler: runv_cli", "lowercase"},
		{"runtimeclass.yaml", "handler: runv-cli", "handler: other", "none of containerd's: [runv runv-cli]"},
		{"runtimeclass.yaml", "podFixed", "podfixed", "unknown field"},
		{"runtimeclass.yaml", "320Mi", "-320Mi", "podFixed"},
		{"crio/runv.conf", "drop_infra_ctr = false", "", "drop_infra_ctr"},
		{"crio/runv.conf", "runtimes.runv]", "runtimes.other]", "no runtime of type oci"},
		{"containerd/runv.toml", "version = 3", "version = 2", "want 3"},
		{"containerd/runv.toml", "runtimes.runv]", "runtimes.runv2]", "none of containerd's"},
	} {
		dir := t.TempDir()
		if err := os.CopyFS(dir, os.DirFS(deployed)); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, c.file)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Replace(string(b), c.old, c.new, 1)
		if text == string(b) {
			t.Errorf("%s has no %q", c.file, c.old)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := run(dir, "", "", "", ""); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s with %q: %v, want %q", c.file, c.new, err, c.want)
		}
	}
}
