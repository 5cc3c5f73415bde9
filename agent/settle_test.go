package agent

import (
	"errors"
	"io"
	"log"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// TestUseMessages: every kind of message can be used, and still can afterwards.
func TestUseMessages(t *testing.T) {
	useMessages()
	want := trialRequest()
	b, err := proto.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	got := new(agentv1.CreateContainerRequest)
	if err := proto.Unmarshal(b, got); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(want, got) {
		t.Errorf("decoded %v, want %v", got, want)
	}
}

// TestLoadRemembers: a module that there is not is looked for once, one that
// failed again and again.
func TestLoadRemembers(t *testing.T) {
	m := parseModules(nil, []byte("broken: broken.ko\n"), []byte("fs-* broken\n"))
	m.root, m.log = t.TempDir(), log.New(io.Discard, "", 0)
	if err := os.WriteFile(filepath.Join(m.root, "broken.ko"), []byte("no module"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.load("net-pf-1"); !errors.Is(err, errNoModule) {
			t.Errorf("a module that there is not: %v", err)
		}
		if err := m.load("fs-x"); err == nil || errors.Is(err, errNoModule) {
			t.Errorf("a module that is broken: %v", err)
		}
	}
	if _, ok := m.asked["fs-x"]; ok || len(m.asked) != 1 {
		t.Errorf("remembered %v", m.asked)
	}
}
