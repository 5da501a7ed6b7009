// Package k8sbundle publishes the X.509 roots of the trust domain, as PEM, in
// ConfigMaps of Kubernetes clusters, for agents and others that mount them.
//
// An annotation says which edition of the bundle a ConfigMap has, and each change
// names the version of the ConfigMap that it was judged by. So a server
// that lags never replaces what a newer one has written; other keys are left alone.
package k8sbundle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/plastron/plastron/internal/config"
	"github.com/plastron/plastron/internal/fault"
	"github.com/plastron/plastron/internal/kube"
	"github.com/plastron/plastron/internal/publish"
)

// Annotation holds EPOCH:SEQUENCE of the bundle in a ConfigMap.
const Annotation = "plastron/bundle-edition"

// Config is the plugin's configuration: one cluster, or several, or both.
type Config struct {
	Cluster
	// Clusters are further clusters, each with the keys of the first. Without any key
	// beside it, it names all of them.
	Clusters []Cluster `hcl:"clusters"`
}

// Cluster is one ConfigMap. It must be there.
type Cluster struct {
	// Namespace, ConfigMap and ConfigMapKey say where the bundle is written.
	// Default: spire, spire-bundle, bundle.crt.
	Namespace    string `hcl:"namespace"`
	ConfigMap    string `hcl:"config_map"`
	ConfigMapKey string `hcl:"config_map_key"`
	// KubeConfigFilePath says how to reach the API server. Default: as a pod of the
	// cluster does.
	KubeConfigFilePath string `hcl:"kube_config_file_path"`

	// What SPIRE has and this plugin does not offer yet: present means refused.
	WebhookLabel    config.Node `hcl:"webhook_label"`
	APIServiceLabel config.Node `hcl:"api_service_label"`
}

func (c Cluster) isSet() bool {
	return c.Namespace != "" || c.ConfigMap != "" || c.ConfigMapKey != "" || c.KubeConfigFilePath != "" ||
		c.WebhookLabel.Present() || c.APIServiceLabel.Present()
}

// all are the clusters that are meant, with what they do not name filled in.
func (c *Config) all() []Cluster {
	out := append([]Cluster(nil), c.Clusters...)
	if c.isSet() || len(out) == 0 {
		out = append([]Cluster{c.Cluster}, out...)
	}
	for i, cluster := range out {
		out[i].Namespace = cmp.Or(cluster.Namespace, "spire")
		out[i].ConfigMap = cmp.Or(cluster.ConfigMap, "spire-bundle")
		out[i].ConfigMapKey = cmp.Or(cluster.ConfigMapKey, "bundle.crt")
	}
	return out
}

func (c Cluster) name() string {
	return strings.TrimPrefix(fmt.Sprintf("%s:%s/%s/%s", c.KubeConfigFilePath, c.Namespace, c.ConfigMap, c.ConfigMapKey), ":")
}

// keyForm is what Kubernetes lets a key of a ConfigMap be.
var keyForm = regexp.MustCompile(`^[-._a-zA-Z0-9]{1,253}$`)

// Validate reports what is wrong with the configuration itself. It reads no file.
func (c *Config) Validate() error {
	var faults []error
	seen := map[string]bool{}
	for _, cluster := range c.all() {
		for _, key := range []struct {
			name string
			node config.Node
		}{{"webhook_label", cluster.WebhookLabel}, {"api_service_label", cluster.APIServiceLabel}} {
			if key.node.Present() {
				faults = append(faults, fault.New(fault.Unsupported, "config_unsupported", "%s: CA bundles of webhooks and API services are not kept up yet", key.name).
					Fix("remove it, and let cert-manager's CA injector or a job of yours copy them from the ConfigMap"))
			}
		}
		if !keyForm.MatchString(cluster.ConfigMapKey) || strings.HasPrefix(cluster.ConfigMapKey, "..") || cluster.ConfigMapKey == "." {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", "config_map_key: %q cannot be a key of a ConfigMap", cluster.ConfigMapKey))
		}
		if err := kube.CheckName(cluster.Namespace, cluster.ConfigMap); err != nil {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", "namespace, config_map: %v", err))
		}
		if seen[cluster.name()] {
			faults = append(faults, fault.New(fault.Invalid, "config_invalid", "clusters: %s is there twice", cluster.name()))
		}
		seen[cluster.name()] = true
	}
	return errors.Join(faults...)
}

// Open reads the kubeconfig files. It connects to nothing.
func (c *Config) Open(context.Context) ([]publish.Place, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	var out []publish.Place
	for _, cluster := range c.all() {
		client, err := kube.ClientConfig{Kubeconfig: cluster.KubeConfigFilePath}.Open()
		if err != nil {
			return nil, err
		}
		out = append(out, &place{Cluster: cluster, client: client})
	}
	return out, nil
}

type place struct {
	Cluster
	client *kube.Client
}

// Name implements publish.Place.
func (p *place) Name() string { return p.name() }

// Publish implements publish.Place. Two requests: what is there, and what is to
// be, provided that nobody was quicker.
func (p *place) Publish(ctx context.Context, e publish.Edition) error {
	text := string(e.Bundle.MarshalPEM())
	if text == "" {
		return fault.New(fault.Unavailable, "bundle_empty", "there are no roots yet to publish")
	}
	m, err := p.client.ConfigMap(ctx, p.Namespace, p.ConfigMap)
	if fault.KindOf(err) == fault.NotFound {
		return fault.New(fault.Precondition, "configmap_missing", "there is no ConfigMap %q in the namespace %q", p.ConfigMap, p.Namespace).
			Fix("make it: kubectl create configmap -n %s %s", p.Namespace, p.ConfigMap).Because(err)
	}
	if err != nil {
		return err
	}
	edition := fmt.Sprintf("%s:%d", e.Epoch, e.Bundle.Sequence)
	if m.Data[p.ConfigMapKey] == text && m.Meta.Annotations[Annotation] == edition {
		return nil
	}
	epoch, sequence, _ := strings.Cut(m.Meta.Annotations[Annotation], ":")
	if has, err := strconv.ParseUint(sequence, 10, 64); err == nil && epoch == e.Epoch && has > e.Bundle.Sequence {
		return nil // this server will hear of that itself, and then has nothing to write
	}
	return p.client.PatchConfigMap(ctx, p.Namespace, p.ConfigMap, kube.ConfigMapPatch{
		Version:     m.Meta.Version,
		Annotations: map[string]string{Annotation: edition},
		Data:        map[string]string{p.ConfigMapKey: text},
	})
}
