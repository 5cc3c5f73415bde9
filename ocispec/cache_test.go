package ocispec

import (
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

func TestCacheMode(t *testing.T) {
	for _, tc := range []struct {
		data  []string
		loose bool
		rest  []string
		err   string
	}{
		{},
		{data: []string{"discard"}, rest: []string{"discard"}},
		{data: []string{"x-runv.cache=loose", "discard"}, loose: true, rest: []string{"discard"}},
		{data: []string{"x-runv.cache=mmap"}},
		{data: []string{"x-runv.cache=loose", "x-runv.cache=mmap"}}, // the last one counts
		{data: []string{"x-runv.cache=none"}, err: `mounts[0].options: "x-runv.cache=none" names no way to cache, want x-runv.cache=mmap or x-runv.cache=loose`},
		{data: []string{"x-runv.format=raw"}, err: `"x-runv.format=raw" is not one of runv's for a bind mount`},
		{data: []string{"x-other=1"}, rest: []string{"x-other=1"}},
	} {
		loose, rest, err := cacheMode("mounts[0]", tc.data)
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%q: error %v, want %q", tc.data, err, tc.err)
			}
			continue
		}
		if err != nil || loose != tc.loose || !slices.Equal(rest, tc.rest) {
			t.Errorf("%q: %v, %q, %v", tc.data, loose, rest, err)
		}
	}
}

// What nobody changes is on the share whose files the guest keeps: volumes that
// say so, and what is below an overlay.
func TestCachedShare(t *testing.T) {
	translate := func(change func(*specs.Spec)) (*agentv1.CreateContainerRequest, error) {
		t.Helper()
		spec := loadTest(t, "runc")
		change(spec)
		req, err := Translate(spec, testOptions(nil))
		if err != nil {
			return nil, err
		}
		return req.Container, nil
	}
	volume := func(options ...string) func(*specs.Spec) {
		return func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/srv", Destination: "/v", Options: options})
		}
	}
	for name, tc := range map[string]struct {
		change func(*specs.Spec)
		root   string
		mount  string
		err    string
	}{
		"nothing said": {change: volume("rbind", "ro"), root: agentv1.ShareTag, mount: agentv1.ShareTag},
		"loose":        {change: volume("rbind", "ro", "x-runv.cache=loose"), root: agentv1.ShareTag, mount: agentv1.CachedShareTag},
		"recursive ro": {change: volume("rbind", "rro", "x-runv.cache=loose"), root: agentv1.ShareTag, mount: agentv1.CachedShareTag},
		"writable":     {change: volume("rbind", "x-runv.cache=loose"), err: `.options: x-runv.cache=loose is for a tree that nobody changes: want "ro" beside it`},
		"below overlay": {change: func(s *specs.Spec) {
			volume("bind", "ro")(s)
			s.Annotations = map[string]string{AnnotationOverlay: "guest"}
		}, root: agentv1.CachedShareTag, mount: agentv1.ShareTag},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := translate(tc.change)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v, want %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if m := c.Mounts[len(c.Mounts)-1]; c.Rootfs.ShareTag != tc.root || m.ShareTag != tc.mount || len(m.Data) != 0 {
				t.Errorf("the root is on %q and the volume on %q with the options %q", c.Rootfs.ShareTag, m.ShareTag, m.Data)
			}
		})
	}
}
