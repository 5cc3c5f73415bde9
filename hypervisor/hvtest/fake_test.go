package hvtest

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/hyperhq/runv/hypervisor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func config(t *testing.T) hypervisor.Config {
	t.Helper()
	dir := t.TempDir()
	c := hypervisor.Config{
		Name: "fake", VCPUs: 1, MemoryMiB: 64,
		Kernel: filepath.Join(dir, "kernel"), Initrd: filepath.Join(dir, "initrd"),
	}
	for path, content := range map[string]string{c.Kernel: "kernel", c.Initrd: "070701"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func TestFake(t *testing.T) { Run(t, &Driver{}, config(t)) }

func TestFakeGuest(t *testing.T) {
	d := &Driver{Guest: func(agent net.Conn) { _, _ = io.Copy(agent, agent) }}
	v, err := d.Start(t.Context(), config(t))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := v.DialAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "ping" {
		t.Errorf("guest answers %q, %v", buf, err)
	}
	d.VMs()[0].Crash(hypervisor.Exit{Code: 1, Stderr: "it broke"})
	<-v.Done()
	if got, want := v.Exit().String(), "exited with code 1: it broke"; got != want {
		t.Errorf("exit is %q, want %q", got, want)
	}
}
